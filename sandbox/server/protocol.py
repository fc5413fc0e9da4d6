"""uvicorn's HTTP/1.1 protocol with three differences: an answer leaves in one write, not its head and body apart;
whoever works for a client can be told when it goes away; and a request says when all of it has come.

Each write is a system call that wakes the client; for answers of a few hundred bytes that is most of the cost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class _Joined:
    """A transport that sends what is written in one turn of the event loop together."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        """Like the transport's."""
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)

    def _flush(self) -> None:
        if self._parts:
            parts, self._parts = self._parts, []
            if not self._transport.is_closing():
                self._transport.write(parts[0] if len(parts) == 1 else b"".join(parts))

    def close(self) -> None:
        """Like the transport's; what was written is sent first."""
        self._flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Client:
    """The other end of a connection: `gone` once it is, and then everything in `watchers` has been called."""

    def __init__(self) -> None:
        self.gone = False
        self.watchers: set[Callable[[], None]] = set()

    def leave(self) -> None:
        """It has hung up."""
        self.gone = True
        for tell in list(self.watchers):
            tell()


class JoiningProtocol(HttpToolsProtocol):
    """For `uvicorn.Config(http=...)`. A request's scope holds its `Client` as `retool.client`, and `retool.complete`
    once all of it has come."""

    def connection_made(self, transport: Any) -> None:
        """asyncio's."""
        self.peer = Client()
        super().connection_made(_Joined(transport, self.loop))  # type: ignore[arg-type]

    def on_message_begin(self) -> None:
        """httptools'."""
        super().on_message_begin()
        self.scope["retool.client"] = self.peer  # type: ignore[typeddict-unknown-key]

    def on_message_complete(self) -> None:
        """httptools'."""
        super().on_message_complete()
        self.scope["retool.complete"] = True  # type: ignore[typeddict-unknown-key]

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's."""
        super().connection_lost(exc)
        self.peer.leave()
