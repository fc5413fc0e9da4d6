"""Servers by one name: `dns+http://sandbox:8080` stands for a server at each of the name's addresses.

That is how replicas of a compose service (`--scale sandbox=3`) or of a headless Kubernetes service appear. Each becomes
a server of its own for `RemoteSandbox`, so that load is counted per replica and a session stays where it was opened.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from sandbox.types import SandboxUnavailable

PREFIX = "dns+"


def addresses(urls: Sequence[str]) -> list[str]:
    """`urls` with every `dns+http://` one replaced by a URL for each of its addresses, in order, without repetition.

    Looks names up: not for an event loop that others wait on. Raises `SandboxUnavailable` for a name without an
    address, `ValueError` for one without a host.
    """
    out: list[str] = []
    for url in urls:
        out += _expand(url) if url.startswith(PREFIX) else [url]
    return list(dict.fromkeys(out))


def _expand(url: str) -> list[str]:
    parts = urlsplit(url.removeprefix(PREFIX))
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"sandbox URL {url!r}: write dns+http://NAME:PORT")
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
    except OSError as error:
        raise SandboxUnavailable(f"{url}: the name {parts.hostname!r} has no address ({error.strerror})") from None
    hosts = sorted({str(entry[4][0]) for entry in found})
    return [f"http://{f'[{host}]' if ':' in host else host}:{parts.port or 80}" for host in hosts]
