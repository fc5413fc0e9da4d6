"""Framed JSON over an asyncio transport: what client and supervisor speak. Bounded, and never unpickled.

A frame is four bytes and a body. The highest bit says which JSON it is: orjson's, which costs a tenth, or the standard
library's, where orjson is not installed or does not take the message (lone surrogates, integers of more than 64 bits).
The other 31 are the length. Client and supervisor are one interpreter's, so what one writes the other can read.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from typing import Any, cast

from sandbox.types import SandboxProtocolError

try:
    import orjson as quick
except ImportError:
    quick = None  # type: ignore[assignment]

MAX_FRAME = 64 * 1024 * 1024
"""Bytes of the largest message between client and supervisor."""
_SIZE = 4
_STANDARD = 1 << 31
_CHUNK = 64 * 1024


def pack_frame(message: dict[str, Any]) -> bytes:
    """A message as head and JSON. Whatever text is in it survives. Raises `SandboxProtocolError` when too large."""
    kind, body = 0, b""
    if quick is not None:
        with contextlib.suppress(TypeError):
            body = quick.dumps(message)
    if not body:
        kind, body = _STANDARD, json.dumps(message, separators=(",", ":")).encode("ascii")
    if len(body) > MAX_FRAME:
        raise SandboxProtocolError(f"message of {len(body)} bytes exceeds {MAX_FRAME}")
    return (kind | len(body)).to_bytes(_SIZE, "big") + body


def _head(data: bytes | bytearray, offset: int = 0) -> tuple[int, Callable[[bytes], Any]]:
    """Length of the body, and what reads it."""
    word = int.from_bytes(data[offset : offset + _SIZE], "big")
    return (word, quick.loads) if word < _STANDARD and quick is not None else (word & ~_STANDARD, json.loads)


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
            size, loads = _head(data, offset)
            if size > MAX_FRAME:
                return self._fail(f"frame of {size} bytes exceeds {MAX_FRAME}")
            if len(data) - offset - _SIZE < size:
                break
            try:
                message = loads(data[offset + _SIZE : offset + _SIZE + size])
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
        return _SIZE + min(_head(buffer)[0], MAX_FRAME)

    def _fail(self, reason: str) -> None:
        self._reason = reason
        if self.transport is not None:
            self.transport.abort()

    def send(self, message: dict[str, Any]) -> None:
        """Queue a message; nothing happens when the other side has gone. Raises `SandboxProtocolError` (too large)."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(pack_frame(message))


__all__ = ["FrameProtocol", "SandboxProtocolError", "pack_frame"]
