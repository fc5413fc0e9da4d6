"""Bearer tokens: where they come from, and who a request belongs to."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

ENVIRONMENT = "RETOOL_SANDBOX_TOKEN"
"""Variable that may hold tokens, separated by blanks or commas; it is removed from this process's environment."""
MIN_LENGTH = 16
ANONYMOUS = "-"
"""Owner of everything where no token is needed."""


def load_tokens(file: str | None) -> tuple[str, ...]:
    """Tokens of `file` (one a line; `#` starts a comment) and of the environment.

    Raises `ValueError` for a file that cannot be read, an unusable token, or a file without any.
    """
    tokens = os.environ.pop(ENVIRONMENT, "").replace(",", " ").split()
    if file is not None:
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--token-file {file}: {error}") from None
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise ValueError(f"--token-file {file}: holds no token; put one on a line, e.g. of `openssl rand -hex 32`")
        tokens += found
    for token in tokens:
        if len(token) < MIN_LENGTH or not token.isascii() or not token.isprintable() or " " in token:
            raise ValueError(
                f"a token needs {MIN_LENGTH} or more printable ASCII characters without blanks "
                f"(one has {len(token)} characters); make one with `openssl rand -hex 32`"
            )
    return tuple(dict.fromkeys(tokens))


class Tokens:
    """Tells who a request belongs to. Only digests are kept."""

    def __init__(self, tokens: Iterable[str] = ()) -> None:
        self._digests = [hashlib.sha256(token.encode()).digest() for token in tokens]

    @property
    def required(self) -> bool:
        """Whether requests need a token."""
        return bool(self._digests)

    def owner(self, authorization: bytes | None) -> str | None:
        """An opaque name of the token in an Authorization header; None when it is not one of ours.

        Takes the same time for every token: digests are compared in constant time, and all of them.
        """
        if not self._digests:
            return ANONYMOUS
        scheme, _, value = (authorization or b"").partition(b" ")
        digest = hashlib.sha256(value.strip()).digest()
        found = None
        for known in self._digests:
            if hmac.compare_digest(known, digest):
                found = known
        return found.hex()[:32] if found is not None and scheme.lower() == b"bearer" else None
