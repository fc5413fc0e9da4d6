"""Servers that are none, for tests of the remote client: they answer nonsense, refuse, or never answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

GREETING = b'{"limits": {"wall_s": 5}}'


def http_answer(body: bytes, kind: bytes = b"application/json", status: bytes = b"200 OK") -> bytes:
    """A whole HTTP answer."""
    return b"HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s" % (status, kind, len(body), body)


class Liar:
    """Answers every request with the same bytes, or not at all (None). `greets`: tells capabilities when asked."""

    def __init__(self, answer: bytes | None, greets: bool) -> None:
        self.answer, self.greets = answer, greets
        self.asked = 0
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                for line in head.lower().split(b"\r\n"):
                    if line.startswith(b"content-length:"):
                        await reader.readexactly(int(line.partition(b":")[2]))
                greeting = self.greets and b"/v1/capabilities" in head
                self.asked += not greeting
                answer = http_answer(GREETING) if greeting else self.answer
                if answer is None:
                    await reader.read()
                    break
                writer.write(answer)
                await writer.drain()
        writer.close()


@contextlib.asynccontextmanager
async def liar(answer: bytes | None, *, greets: bool = False) -> AsyncIterator[Liar]:
    """A `Liar` for the length of a block."""
    it = Liar(answer, greets)
    server = await asyncio.start_server(it.serve, "127.0.0.1", 0)
    it.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield it
    finally:
        server.close()
