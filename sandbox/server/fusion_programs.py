"""How `/run_code` runs other things than plain Python: small programs of ours, run in the confined child."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

CODE_FILE = {"pytest": "test_main.py", "bash": "main.sh"}
"""Where the user's text is put, by language."""

_BASH = """
import os, shutil
shell = shutil.which("bash") or shutil.which("sh")
if shell is None:
    raise SystemExit("no shell is installed here")
try:
    os.execv(shell, [shell, "main.sh"])
except OSError as error:
    raise SystemExit(f"a shell cannot be started in this isolation tier: {error}") from None
"""

_PYTEST = """
import sys
try:
    import pytest
except ImportError:
    raise SystemExit("pytest is not installed on this server: pip install pytest") from None
raise SystemExit(int(pytest.main(["-p", "no:cacheprovider", "test_main.py", *sys.stdin.read().split("\\0")[1:]])))
"""


def program(language: str, code: str, args: Sequence[str]) -> tuple[str, Mapping[str, bytes], str | None]:
    """(Python source, files to add, standard input or None for the caller's own) that run `code` as `language`.

    Raises `UnicodeEncodeError` when `code` is not text.
    """
    if language == "python":
        # A script, not a REPL: the value of a last expression is not shown.
        return f"{code}\n\nNone\n", {}, None
    files = {CODE_FILE[language]: code.encode("utf-8")}
    if language == "bash":
        return _BASH, files, None
    return _PYTEST, files, "\0".join(["", *args])
