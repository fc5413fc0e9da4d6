"""Reads a run's pipes from the first byte, so that output neither blocks it nor gets lost."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

_CHUNK = 1 << 16


class Stream:
    """One output stream: keeps the first `head` and the last `tail` bytes, counts all."""

    def __init__(self, head: int, tail: int) -> None:
        self.head_size, self.tail_size = head, tail
        self.head = bytearray()
        self.tail = bytearray()
        self.total = 0

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        self.total += len(data)
        room = self.head_size - len(self.head)
        if room > 0:
            self.head += data[:room]
            data = data[room:]
        if data:
            self.tail += data
            if len(self.tail) > 2 * self.tail_size + _CHUNK:
                del self.tail[: len(self.tail) - self.tail_size]

    @property
    def truncated(self) -> bool:
        """Whether bytes in the middle were dropped."""
        return self.total > self.head_size + self.tail_size

    def text(self) -> str:
        """What was kept, with a note where bytes are missing; bytes that are not UTF-8 become U+FFFD."""
        if not self.truncated:
            return (self.head + self.tail).decode("utf-8", "replace")
        tail = self.tail[len(self.tail) - self.tail_size :] if self.tail_size else bytearray()
        omitted = self.total - len(self.head) - len(tail)
        head_text = self.head.decode("utf-8", "ignore")
        return f"{head_text}\n... [{omitted} bytes omitted] ...\n{tail.decode('utf-8', 'ignore')}"


class Pump:
    """Feeds streams from file descriptors while the event loop runs; calls `on_flood` once past `cap` bytes in all."""

    def __init__(self, cap: int, on_flood: Callable[[], None]) -> None:
        self.cap = cap
        self.total = 0
        self._on_flood = on_flood
        self.unclosed = 0
        self._open: dict[int, Stream] = {}

    def attach(self, fd: int, stream: Stream) -> None:
        """Start reading a non-blocking descriptor."""
        self._open[fd] = stream
        asyncio.get_running_loop().add_reader(fd, self._readable, fd)

    @property
    def flooded(self) -> bool:
        """Whether more than the cap came out."""
        return self.total > self.cap

    @property
    def reading(self) -> bool:
        """Whether something is read still: its end has not come."""
        return bool(self._open)

    def _readable(self, fd: int) -> bool:
        """Read once; False when there is nothing more to read now."""
        try:
            data = os.read(fd, _CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self.detach(fd)
            return False
        before = self.flooded
        self.total += len(data)
        self._open[fd].feed(data)
        if self.flooded and not before:
            self._on_flood()
        return True

    def sip(self) -> None:
        """Take what the pipes hold now."""
        for fd in list(self._open):
            for _ in range(1024):
                if not self._readable(fd):
                    break

    def drain(self) -> None:
        """After the writers are dead: take what the pipes still hold and stop reading.

        A pipe without an end still has a writer somewhere: something survived. `unclosed` counts them.
        """
        self.sip()
        for fd in list(self._open):
            self.unclosed += 1
            self.detach(fd)

    def detach(self, fd: int) -> None:
        """Stop reading `fd`."""
        if self._open.pop(fd, None) is not None:
            asyncio.get_running_loop().remove_reader(fd)


def write_some(fd: int, data: bytes) -> bytes:
    """Write what fits into a non-blocking pipe now; returns the rest, nothing when its reader has gone away."""
    try:
        return data[os.write(fd, data) :]
    except BlockingIOError:
        return data
    except BrokenPipeError:
        return b""


async def write_all(fd: int, data: bytes) -> None:
    """Write everything to a non-blocking pipe; a reader that has gone away ends it quietly."""
    loop = asyncio.get_running_loop()
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            writable = asyncio.Event()
            loop.add_writer(fd, writable.set)
            try:
                await writable.wait()
            finally:
                loop.remove_writer(fd)
        except BrokenPipeError:
            return
