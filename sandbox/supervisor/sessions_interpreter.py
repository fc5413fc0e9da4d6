"""The supervisor's end of one live interpreter: commands out, answers in, output kept.

The reader of answers stays for its whole life. Output is read when an execution ends, and while it goes on only if it
lasts: most end before a reader would have been worth its registration.

Nothing that comes back is trusted: sizes are capped, and whoever says anything but the answer that is awaited is never
listened to again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sandbox.supervisor import cores
from sandbox.supervisor.outcome import parse_head
from sandbox.supervisor.pump import Stream
from sandbox.supervisor.unit import Child
from sandbox.types import Limits, SessionError
from sandbox.worker import channel

Answer = Callable[[dict[str, Any], bytes], None]

_PROCESS_GROUP = 4  # PIDFD_SIGNAL_PROCESS_GROUP, Linux 6.9
_CHUNK = 32 * 1024
_DRAIN_READS = 256


@dataclass(frozen=True)
class Place:
    """Where a copy lives: its `folder` lies below that of the Landlock domain `outer`; it runs in `domain`."""

    folder: str = ""
    outer: int = 0
    domain: int = 0


class Output:
    """What an execution has printed; `cap` bounds both streams together."""

    def __init__(self, limits: Limits) -> None:
        self.stdout = Stream(limits.output_head_bytes, limits.output_tail_bytes)
        self.stderr = Stream(limits.output_head_bytes, limits.output_tail_bytes)
        self.cap = limits.output_kill_bytes

    @property
    def flooded(self) -> bool:
        """Whether more than the cap came out."""
        return self.stdout.total + self.stderr.total > self.cap


_KEEP_NOTHING = Limits(output_head_bytes=0, output_tail_bytes=0)


class Interpreter:
    """`on_flood` is called when an execution prints more than its cap; `on_nonsense` once, when its report holds
    anything but what is awaited: without it, the process is killed."""

    def __init__(self, child: Child, pid: int) -> None:
        self.child, self.pid = child, pid
        self.place = Place()
        self.clock = (~pid << 3) | 2  # the kernel's number for the CPU clock of that process
        self._discarded = Output(_KEEP_NOTHING)  # what is read while nothing runs
        self.output = self._discarded
        self.on_flood: Callable[[], None] | None = None
        self.on_nonsense: Callable[[], None] | None = None
        self._outputs = (child.stdout, child.stderr)
        self._listening = False
        self._holds = select.poll()  # asks both streams at once, and most of the time neither holds anything
        for fd in self._outputs:
            self._holds.register(fd, select.POLLIN)
        self._closed: set[int] = set()
        self._number = 0
        self._awaited: deque[tuple[int, Answer, int]] = deque()  # number, who wants to know, bytes of data at most
        self._deaf = False
        self.bound = False  # to one processor
        self._buffer = bytearray()
        self._unsent = b""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(child.report, self._read_report)

    # --- output ---------------------------------------------------------------------------------------------------

    def _read_output(self, fd: int) -> bool:
        """Read once; False when there is nothing more now."""
        try:
            data = os.read(fd, _CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._loop.remove_reader(fd)
            self._holds.unregister(fd)
            self._closed.add(fd)
            return False
        output = self.output
        (output.stdout if fd == self.child.stdout else output.stderr).feed(data)
        if self.on_flood is not None and output.flooded:
            self.on_flood()
        return True

    def begin(self, limits: Limits, on_flood: Callable[[], None]) -> None:
        """From here on output belongs to a new execution: what a thread has printed since the last one, too."""
        self.output, self.on_flood = Output(limits), on_flood

    def listen(self) -> None:
        """Read output while the execution goes on: it has lasted longer than most. Its pipe could become full."""
        if not self._listening:
            self._listening = True
            for fd in self._outputs:
                if fd not in self._closed:
                    self._loop.add_reader(fd, self._read_output, fd)

    def finish(self) -> Output:
        """The output of the execution that has ended, to the last byte that is in the pipes."""
        if self._listening:
            for fd in self._outputs:
                self._loop.remove_reader(fd)
        for fd, _ in self._holds.poll(0):
            for _ in range(_DRAIN_READS):
                if fd in self._closed or not self._read_output(fd):
                    break
        self._listening = False
        output, self.output, self.on_flood = self.output, self._discarded, None
        return output

    # --- commands and answers -------------------------------------------------------------------------------------

    def send(self, kind: bytes, fields: dict[str, Any] | None, data: bytes, answer: Answer, cap: int = 0) -> None:
        """Send a command; `answer` is called with what comes back, of at most `cap` bytes of data. One at a time, but
        the answer to one that nobody waits for any more may still be due."""
        self._number = (self._number + 1) & 0xFFFFFFFF
        self._awaited.append((self._number, answer, cap))
        self.send_job(channel.pack(kind, self._number, fields, data))

    def send_job(self, payload: bytes) -> None:
        """Write to the job socket, now or as soon as it takes more."""
        try:
            sent = os.write(self.child.job, payload)
        except BlockingIOError:
            sent = 0
        except OSError:  # it has closed its end: it will never answer
            self._nonsense()
            return
        if sent < len(payload):
            self._unsent = payload[sent:]
            self._loop.add_writer(self.child.job, self._write_rest)

    def _write_rest(self) -> None:
        try:
            self._unsent = self._unsent[os.write(self.child.job, self._unsent[: 1 << 20]) :]
        except BlockingIOError:
            return
        except OSError:
            self._unsent = b""
            self._nonsense()
        if not self._unsent:
            self._loop.remove_writer(self.child.job)

    def send_descriptors(self, fds: list[int]) -> None:
        """After a FORK command. Raises `OSError`."""
        job = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=self.child.job)
        try:
            socket.send_fds(job, [b"f"], fds)
        finally:
            job.detach()

    def ask(
        self, kind: bytes, fields: dict[str, Any] | None = None, data: bytes = b"", cap: int = 0
    ) -> asyncio.Future[tuple[dict[str, Any], bytes]]:
        """`send`; the answer is to come. The caller limits the time. Raises `SessionError(session_ended)`."""
        future: asyncio.Future[tuple[dict[str, Any], bytes]] = self._loop.create_future()

        def ended(_: object) -> None:
            if not future.done():
                future.set_exception(SessionError("the session has ended: its process has ended", "session_ended"))

        def answered(answer: dict[str, Any], body: bytes) -> None:
            if not future.done():
                future.set_result((answer, body))

        def done(asked: asyncio.Future[tuple[dict[str, Any], bytes]]) -> None:
            self.child.exited.remove_done_callback(ended)
            if not asked.cancelled():
                asked.exception()  # who asked may have failed meanwhile, and not look

        self.child.exited.add_done_callback(ended)
        future.add_done_callback(done)
        self.send(kind, fields, data, answered, cap)
        return future

    def _nonsense(self) -> None:
        """It is not heard any more: what it says next could be a perfect answer, or come without end."""
        if self._deaf:
            return
        self._deaf = True
        self._buffer.clear()
        if self.child.report >= 0:
            self._loop.remove_reader(self.child.report)
        if self.on_nonsense is not None:
            self.on_nonsense()
        else:
            self.kill()

    def _read_report(self) -> None:
        try:
            data = os.read(self.child.report, _CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._loop.remove_reader(self.child.report)
            self._closed.add(self.child.report)
            return
        buffer = self._buffer
        buffer += data
        start = 0
        while start < len(buffer) and (end := self._take(start)):
            start = end
        del buffer[:start]

    def _take(self, start: int) -> int:
        """Hear the frame that begins there; returns where it ends, or 0 when it is not complete or not the awaited."""
        buffer = self._buffer
        if not self._awaited:
            self._nonsense()
            return 0
        if len(buffer) - start < channel.FRAME.size:
            return 0
        awaited, answer, cap = self._awaited[0]
        kind, number, head, body = channel.FRAME.unpack_from(buffer, start)
        if kind != channel.DONE or number != awaited or head > channel.HEAD_BYTES or body > cap:
            self._nonsense()
            return 0
        start += channel.FRAME.size
        end = start + int(head) + int(body)
        if len(buffer) < end:
            return 0
        self._awaited.popleft()
        try:
            fields = parse_head(bytes(buffer[start : start + head]))
            if fields is not None:
                answer(fields, bytes(buffer[end - body : end]))
                return 0 if self._deaf else end
        except Exception as error:  # whatever it was: nobody may wait for ever
            self._loop.call_exception_handler({"message": "an answer could not be handled", "exception": error})
        self._nonsense()
        return 0

    # --- the process ----------------------------------------------------------------------------------------------

    def cpu_s(self) -> float:
        """CPU seconds of the process so far; 0 when it is gone."""
        try:
            return time.clock_gettime(self.clock)
        except OSError:
            return 0.0

    def settle(self) -> None:
        """See `cores`."""
        self.bound = cores.settle(self.child.process, self.bound)

    def interrupt(self) -> None:
        """SIGINT: KeyboardInterrupt where user code runs, nothing elsewhere."""
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self.child.process, signal.SIGINT)

    def kill(self) -> None:
        """SIGKILL to its process group, where the kernel can, and in any case to itself."""
        if self.child.process < 0:
            return
        for flags in (_PROCESS_GROUP, 0):
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self.child.process, signal.SIGKILL, None, flags)

    def detach(self) -> None:
        """Stop reading and writing; the descriptors stay open for whoever closes the child."""
        for fd in (self.child.stdout, self.child.stderr, self.child.report):
            if fd >= 0:
                self._loop.remove_reader(fd)
        if self.child.job >= 0:
            self._loop.remove_writer(self.child.job)
        self.on_flood = self.on_nonsense = None
        self._awaited.clear()
        self._closed.update((self.child.stdout, self.child.stderr))
