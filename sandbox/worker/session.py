"""The loop of a live interpreter: one command, one answer, until the supervisor hangs up or kills it.

User code shares this process and may break everything here; that is its own session's loss. What is answered is what
the session says about itself: limits, clocks and the kill are the supervisor's.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import os
import resource
import signal
import socket
import sys
from typing import Any

from sandbox.linux import landlock, seccomp
from sandbox.linux.syscalls import SUPPORTED
from sandbox.worker import branch, channel, files, root, stage
from sandbox.worker.display import cell_name, describe, packed, rich_results, run_source

_TREE_LOCK = seccomp.build_tree_lock() if SUPPORTED else b""
_getpid = os.getpid  # whatever user code makes of it
_HIGH = 250  # below the limit of descriptors, 256


class Interpreter:
    """State of one live interpreter."""

    def __init__(self, stand: stage.Stand, job: int, report: int, settings: dict[str, Any], filtered: bool) -> None:
        self.job, self.report, self.filtered = job, report, filtered
        self.processes = settings["processes"]
        self.process = _getpid()
        folder = os.getcwd()  # noqa: PTH109
        self.home = branch.Home(folder, folder)
        self.readable = branch.readable_paths(folder)
        self.granted: list[tuple[str, int]] = []  # the same with rights, once they are needed
        self.raw, self.stdout, self.names = stand.raw, stand.stdout, stand.names
        self.armed = False
        self.asleep = False
        self.may_kill = True
        self.fed = False  # whether standard input holds something
        self.number = 0

    def _interrupt(self, *_: object) -> None:
        if self.armed:
            raise KeyboardInterrupt

    def serve(self) -> None:
        """Never returns."""
        signal.signal(signal.SIGINT, self._interrupt)
        while True:
            kind, number, json_size, data_size = channel.FRAME.unpack(
                channel.read_exactly(self.job, channel.FRAME.size)
            )
            fields = json.loads(channel.read_exactly(self.job, json_size)) if json_size else {}
            data = channel.read_exactly(self.job, data_size)
            answer: dict[str, Any] = {}
            body = b""
            try:
                if kind == channel.EXEC:
                    answer, body = self.execute(fields, data)
                    if _getpid() != self.process:  # user code has forked, and this is what came of it
                        os._exit(answer.get("exit_code", int("exception" in answer)))
                elif kind == channel.FORK:
                    if self.fork(fields):
                        continue  # in the copy: it has said hello already
                elif kind == channel.PUT:
                    files.write(self.home.folder, fields["path"], data)
                elif kind == channel.GET:
                    body = files.read(self.home.folder, fields["path"], fields["cap"])
                elif kind == channel.LIST:
                    found = files.listing(self.home.folder)
                    answer = {"sizes": [size for _, size in found]}
                    body = b"\0".join([os.fsencode(path) for path, _ in found])
                elif kind == channel.SLEEP:
                    branch.sleep()
                    self.asleep = True
            except files.FileError as error:
                answer = {"error": {"code": error.code, "message": str(error)}}
            except branch.Unsafe as error:
                answer = {"error": {"code": "fork_unsafe", "message": str(error)}}
            except OSError as error:
                answer = {"error": {"code": "os", "message": str(error), "errno": error.errno}}
            channel.write_exactly(self.report, channel.pack(channel.DONE, number, answer, body))
            if kind == channel.FORK:
                branch.remove_dead(self.home, fields["dead"])  # nobody waits for that
            del data, fields

    def execute(self, fields: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        """Run one cell. The answer holds exception, exit_code, rss (KiB) and, when asked for, display and its data."""
        stdin_size = fields.get("stdin_size", 0)
        code = data[: len(data) - stdin_size]
        if stdin_size or self.fed:
            self._feed(data[len(code) :])
        if "processes" in fields:
            self._allow_processes(fields["processes"])
        self.number += 1
        self.raw.written = 0
        signal.signal(signal.SIGINT, self._interrupt)
        answer: dict[str, Any] = {}
        display = b""
        try:
            self.armed = True
            display = self._run(code.decode(), bool(fields.get("rich")), answer)
            self.armed = False
        except BaseException as error:  # an interrupt between two of our own steps
            self.armed = False
            answer["exception"] = describe(error)
        self._flush()
        answer["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return answer, display

    def _feed(self, stdin: bytes) -> None:
        """Standard input of the next cell."""
        if stdin:
            stage.provide_stdin(stdin)
        else:
            stage.no_stdin()
        stage.open_stdin()
        self.fed = bool(stdin)

    def _flush(self) -> None:
        """What was printed through the stream we gave."""
        with contextlib.suppress(BaseException):
            self.stdout.flush()

    def _run(self, code: str, rich: bool, answer: dict[str, Any]) -> bytes:
        shown: list[Any] = []
        display = b""
        try:
            run_source(code, self.names, self.raw, cell_name(self.number), shown if rich else None)
            if rich:
                answer["display"], display = packed(rich_results(shown))
        except SystemExit as error:
            answer["exit_code"] = stage.exit_code(error.code)
        except BaseException as error:
            reserve = stage.memory_reserve() if isinstance(error, MemoryError) else contextlib.nullcontext()
            with reserve:
                answer["exception"] = describe(error)
        if sys.stdout is not self.stdout:  # user code's own: it may hang, and be interrupted
            stage.flush_all(sys.stdout)
        return display

    def _allow_processes(self, count: int) -> None:
        """Copies of us count against our limit: the supervisor says how many there are."""
        _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NPROC, (count if hard < 0 else min(count, hard), hard))

    def fork(self, fields: dict[str, Any]) -> bool:
        """Make one copy; True in it. Raises `Unsafe`, `OSError` in the original only."""
        received: list[int] = []
        plan = None
        try:
            try:
                self.granted = self.granted or landlock.grants(self.readable, root.DEVICES)
                plan = branch.plan(self.home, fields, (self.job, self.report), self.granted)
            finally:
                received = self._receive_descriptors()  # something comes in any case
            if not received:
                raise branch.Unsafe("there are no descriptors for a copy")
            if self.may_kill and self.filtered:
                seccomp.install(_TREE_LOCK)
                self.may_kill = False
            self._allow_processes(fields["processes"])
            states = branch.random_states() if plan.seed is None else None
            received[0], received[3] = _high(received[0]), _high(received[3])
            if branch.clone_sibling():
                return False
            self._become_copy(received, plan, states)
            return True
        finally:
            if plan is not None:
                plan.drop()
            for fd in received:
                with contextlib.suppress(OSError):
                    os.close(fd)

    def _become_copy(self, received: list[int], plan: branch.Plan, states: Any) -> None:
        """Up to SETTLED, what must be done before the copy is handed out; after it, what can wait until somebody knows.

        Of `received` are kept the job socket and the report; the original's take their places, to be closed.
        """
        try:
            os.setsid()  # first: from now on it may be killed with its group
            self.process = _getpid()
            self.job, received[0] = received[0], self.job
            self.report, received[3] = received[3], self.report
            if not self.asleep:
                os.write(self.job, channel.BORN)  # while the supervisor looks who we are, we go on
            os.dup2(received[1], 1)
            os.dup2(received[2], 2)
            self.home = branch.settle(plan)
            if self.fed:
                self._feed(b"")
            if states is not None:
                branch.set_random_states(states)
            if self.asleep:  # nobody could look who we are before
                branch.wake()
                self.asleep = False
                os.write(self.job, channel.BORN)
            os.write(self.job, channel.SETTLED)
            branch.furnish(self.home)
        except BaseException as error:
            word = channel.UNSAFE if isinstance(error, branch.Unsafe) else channel.FAILED
            with contextlib.suppress(BaseException):
                os.write(self.job, word + f"{error}"[:1000].encode(errors="replace"))
                os.read(self.job, 1)  # until it is heard: who has gone cannot be identified
            os._exit(125)

    def _receive_descriptors(self) -> list[int]:
        """Job, stdout, stderr and report of the copy."""
        size = array.array("i").itemsize
        end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=self.job)
        try:
            data, ancillary, _, _ = end.recvmsg(1, socket.CMSG_SPACE(4 * size))
        finally:
            end.detach()
        if not data:
            os._exit(0)
        fds = array.array("i")
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % size])
        return list(fds)


def _high(fd: int) -> int:
    """The same at a number that ordinary code does not reach; where all of them are taken, as it is."""
    try:
        high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH)
    except OSError:
        os.set_inheritable(fd, False)
        return fd
    os.close(fd)
    return high


def serve(stand: stage.Stand, job: int, report: int, settings: dict[str, Any], base_bytes: int, filtered: bool) -> None:
    """Be a session until the end; never returns."""
    interpreter = Interpreter(stand, job, report, settings, filtered)
    stage.seed_all(settings["seed"])
    stage.apply_limits(settings, base_bytes, filtered)
    interpreter.serve()
