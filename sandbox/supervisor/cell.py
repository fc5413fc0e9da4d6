"""A process namespace as the supervisor sees it: its init behind a socket, emptied after every run and used again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket

from sandbox.worker.init import CLEAR, EMPTY, STUCK

CLEAR_TIMEOUT_S = 10.0


class Cell:
    """`pidfd` is the init's; the kernel kills everything in the namespace when the init dies."""

    def __init__(self, pidfd: int, control: socket.socket) -> None:
        self.pidfd = pidfd
        self.control = control
        self.reusable = True
        self._reply: asyncio.Future[bytes] | None = None
        control.setblocking(False)
        asyncio.get_running_loop().add_reader(control.fileno(), self._readable)

    def _readable(self) -> None:
        try:
            data = self.control.recv(1)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.reusable = False
            asyncio.get_running_loop().remove_reader(self.control.fileno())
        if self._reply is not None and not self._reply.done():
            self._reply.set_result(data)

    async def clear(self) -> bool:
        """Kill whatever is left inside; True when nothing is. The run's first process must be dead and reaped."""
        self._reply = asyncio.get_running_loop().create_future()
        answer = STUCK
        with contextlib.suppress(OSError, TimeoutError):
            self.control.send(CLEAR)
            async with asyncio.timeout(CLEAR_TIMEOUT_S):
                answer = await self._reply
        if answer != EMPTY:
            self.reusable = False
        if answer in (STUCK, b""):
            return await self.destroy()
        return True

    async def destroy(self) -> bool:
        """Kill the init and with it everything inside; True once it is dead, which it is last of all."""
        self.reusable = False
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        return await wait_pidfd(self.pidfd, CLEAR_TIMEOUT_S)

    def close(self) -> None:
        """Let go: an init that nobody commands ends, and everything inside with it. May be called twice."""
        if self.pidfd >= 0:
            self.reusable = False
            asyncio.get_running_loop().remove_reader(self.control.fileno())
            self.control.close()
            os.close(self.pidfd)
            self.pidfd = -1


async def wait_pidfd(fd: int, patience_s: float) -> bool:
    """True once the process behind a pidfd has ended; a timeout is an answer here."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    loop.add_reader(fd, done.set)
    try:
        async with asyncio.timeout(patience_s):
            await done.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(fd)
    return True
