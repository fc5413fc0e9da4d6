"""Framed JSON over an asyncio transport: what client and supervisor speak. Bounded, and never unpickled."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, cast

from sandbox.types import SandboxProtocolError

MAX_FRAME = 64 * 1024 * 1024
"""Bytes of the largest message between client and supervisor."""
_JSON = json.JSONEncoder(separators=(",", ":"))
_SIZE = 4
_CHUNK = 64 * 1024


def pack_frame(message: dict[str, Any]) -> bytes:
    """A message as length and JSON. Lone surrogates survive. Raises `SandboxProtocolError` when too large."""
    body = _JSON.encode(message).encode("ascii")
    if len(body) > MAX_FRAME:
        raise SandboxProtocolError(f"message of {len(body)} bytes exceeds {MAX_FRAME}")
    return len(body).to_bytes(_SIZE, "big") + body


class FrameProtocol(asyncio.BufferedProtocol):
    """Calls `on_message` for every frame and `on_end` once, with a reason (empty for an orderly end).

    While the other side does not read what is sent, nothing more of it is read: memory stays bounded.
    """

    def __init__(self, on_message: Callable[[dict[str, Any]], None], on_end: Callable[[str], None]) -> None:
        self._on_message, self._on_end = on_message, on_end
        self._space = memoryview(bytearray(_CHUNK))  # received into; a fresh buffer for every read costs more
        self._rest = bytearray()
        self._reason = ""
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's."""
        self._on_end(self._reason)

    def pause_writing(self) -> None:
        """asyncio's."""
        if self.transport is not None:
            self.transport.pause_reading()

    def resume_writing(self) -> None:
        """asyncio's."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()

    def get_buffer(self, sizehint: int) -> memoryview:
        """asyncio's."""
        return self._space

    def buffer_updated(self, nbytes: int) -> None:
        """asyncio's."""
        rest = self._rest
        if rest:
            rest += self._space[:nbytes]
            if len(rest) < self._wanted(rest):
                return
            data = bytes(rest)
            rest.clear()
        else:
            data = bytes(self._space[:nbytes])
        offset = 0
        while len(data) - offset >= _SIZE:
            size = int.from_bytes(data[offset : offset + _SIZE], "big")
            if size > MAX_FRAME:
                return self._fail(f"frame of {size} bytes exceeds {MAX_FRAME}")
            if len(data) - offset - _SIZE < size:
                break
            try:
                message = json.loads(data[offset + _SIZE : offset + _SIZE + size])
            except (ValueError, RecursionError) as error:
                return self._fail(f"frame is not JSON: {error}")
            if not isinstance(message, dict):
                return self._fail(f"frame holds {type(message).__name__}, not an object")
            offset += _SIZE + size
            self._on_message(message)
        rest += data[offset:]

    @staticmethod
    def _wanted(buffer: bytearray) -> int:
        """Bytes that make the first frame complete."""
        if len(buffer) < _SIZE:
            return _SIZE
        return _SIZE + min(int.from_bytes(buffer[:_SIZE], "big"), MAX_FRAME)

    def _fail(self, reason: str) -> None:
        self._reason = reason
        if self.transport is not None:
            self.transport.abort()

    def send(self, message: dict[str, Any]) -> None:
        """Queue a message; nothing happens when the other side has gone. Raises `SandboxProtocolError` (too large)."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(pack_frame(message))


__all__ = ["FrameProtocol", "SandboxProtocolError", "pack_frame"]
