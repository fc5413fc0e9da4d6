"""A session: one execution at a time in a live interpreter, numbered, timed, judged, its results kept for retries."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sandbox.results import encode_error
from sandbox.supervisor.admission import Admission as Slots
from sandbox.supervisor.outcome import (
    NO_KILLS,
    OOM_WATCH,
    Ending,
    Kills,
    Outcome,
    digest,
    judge,
    parse_display,
    parse_exception,
)
from sandbox.supervisor.sessions_interpreter import Interpreter, Output
from sandbox.supervisor.sessions_tree import Tree
from sandbox.types import ExceptionInfo, Limits, SandboxError, SandboxInfraError, SessionError, Status
from sandbox.wire import UNKNOWN_STATUS
from sandbox.worker import channel
from sandbox.worker.display import DISPLAY_BYTES

Reply = dict[str, Any]
LISTEN_S = 0.004
"""An execution that lasts longer has its output read while it runs."""
TICK_S = 0.05
GRACE_S = 0.5
"""From the interrupt to the kill."""
END_S = 5.0
"""From the kill to the moment when nobody waits for the process's end any more."""
EARLY_S = 0.1
"""An interrupt so soon after the start is repeated."""
KEEP_RESULTS = 64
KEEP_BYTES = 4 * 1024 * 1024
_RSS_MAX = 1 << 40  # KiB: what is more is no machine's
_FORGED = "the session wrote to its control channel"


@dataclass(frozen=True)
class Request:
    """One execution as it was asked for."""

    code: str
    stdin: str
    limits: Limits
    rich: bool = False
    owner: str = ""
    ident: int = 0
    """Number of the message that asked."""


@dataclass
class Step:
    """An execution under way. `replies` are called with the reply, each once."""

    number: int
    request: Request
    replies: list[Callable[[Reply], None]]
    asked: float
    started: float = 0.0
    cpu_before: float = 0.0
    kills_before: Kills = NO_KILLS
    cpu_s: float = 0.0
    stopping: Status | None = None
    kill_at: float = 0.0
    cancelled: bool = False
    timer: asyncio.TimerHandle | None = None


@dataclass
class Past:
    """Replies of executions that are done: the last `KEEP_RESULTS`, and no more than `KEEP_BYTES`."""

    replies: OrderedDict[int, tuple[int, int, Reply]] = field(default_factory=OrderedDict)
    size: int = 0

    def add(self, number: int, request: Request, reply: Reply, size: int) -> None:
        """Remember the reply of execution `number`."""
        self.replies[number] = (hash((request.code, request.stdin)), size, reply)
        self.size += size
        while len(self.replies) > KEEP_RESULTS or (self.size > KEEP_BYTES and len(self.replies) > 1):
            self.size -= self.replies.popitem(last=False)[1][1]

    def find(self, number: int, request: Request) -> Reply:
        """The stored reply. Raises `SessionError(step_conflict)`."""
        kept = self.replies.get(number)
        if kept is None:
            raise SessionError(f"step {number} is done; its result is no longer kept", "step_conflict")
        if kept[0] != hash((request.code, request.stdin)):
            raise SessionError(f"step {number} is done, and it was another program", "step_conflict")
        return kept[2]

    def copy(self) -> Past:
        """For a branch."""
        return Past(OrderedDict(self.replies), self.size)


class LiveSession:
    """What callers see as a session. `interpreter` is replaced by `restore`.

    `enter` and `leave` are the admission: `enter` starts at once and returns True, or calls back later.
    """

    def __init__(self, ident: str, tree: Tree, interpreter: Interpreter, seed: int, admission: Admission) -> None:
        self.id, self.tree, self.seed = ident, tree, seed
        self.limits = tree.limits
        self.step = 0
        self.past = Past()
        self.depth = self.forks = 0
        self.ttl_s = self.expires = 0.0
        self.running: Step | None = None
        self.claimed = False
        self.ended = ""
        self.on_end: Callable[[LiveSession], None] = lambda _: None
        self._admission = admission
        self._processes = tree.limits.processes
        self.adopt(interpreter)

    def adopt(self, interpreter: Interpreter) -> None:
        """Go on with this interpreter."""
        self.interpreter = interpreter
        self._processes = 0
        interpreter.on_nonsense = lambda: self._forged(interpreter)
        interpreter.child.exited.add_done_callback(lambda _: self._exited(interpreter))

    def renew(self) -> None:
        """Every call does."""
        self.expires = time.monotonic() + self.ttl_s

    def claim(self) -> None:
        """Before anything but an execution. Raises `SessionError` (busy, session_ended)."""
        self.check()
        if self.running is not None or self.claimed:
            raise SessionError("an execution or another operation is under way in this session", "busy")
        self.claimed = True

    def check(self) -> None:
        """Raises `SessionError(session_ended)`."""
        if self.ended:
            raise SessionError(f"the session has ended: {self.ended}", "session_ended")

    # --- executions -----------------------------------------------------------------------------------------------

    def execute(self, request: Request, expect: int | None, reply: Callable[[Reply], None]) -> None:
        """Run, attach or repeat; `reply` is called once, now or later. Raises `SessionError`, `SandboxOverloaded`."""
        running = self.running
        if expect is not None:
            if expect < 1 or expect > self.step + 1 + (running is not None):
                raise SessionError(f"expected step {expect}, but {self.step} are done", "step_conflict")
            if expect <= self.step:
                reply(self.past.find(expect, request))
                return
            if running is not None and expect == running.number:
                if (running.request.code, running.request.stdin) != (request.code, request.stdin):
                    raise SessionError(f"step {expect} is running, and it is another program", "step_conflict")
                running.replies.append(reply)
                return
        self.check()
        if running is not None or self.claimed:
            raise SessionError("an execution or another operation is under way in this session", "busy")
        step = Step(self.step + 1, request, [reply], time.monotonic())
        self.running = step
        try:
            if self._admission.enter(request.owner, lambda: self._start(step), lambda e: self._refused(step, e)):
                self._start(step)
        except SandboxError:
            self.running = None
            raise

    def _refused(self, step: Step, error: SandboxError) -> None:
        """There will be no slot: the execution is no step."""
        self._admission.count_error(error)
        self._reply(step, {"error": encode_error(error)})

    def _start(self, step: Step) -> None:
        """A slot is ours: hand the code over."""
        if self.ended or step.cancelled:
            self._admission.leave()
            self._reply(step, {"error": encode_error(SessionError(self.ended or "cancelled", "session_ended"))})
            return
        request, interpreter = step.request, self.interpreter
        step.started = time.monotonic()
        step.cpu_before = interpreter.cpu_s()
        step.kills_before = OOM_WATCH.begin()
        fields: dict[str, Any] = {}
        stdin = b""
        if request.stdin:
            stdin = request.stdin.encode("utf-8", "surrogateescape")
            fields["stdin_size"] = len(stdin)
        if request.rich:
            fields["rich"] = True
        if self.tree.processes != self._processes:
            self._processes = fields["processes"] = self.tree.processes
            if self.tree.copied:  # else it has just been given its limits
                self.tree.allow(interpreter, self.tree.processes)
        cap = DISPLAY_BYTES if request.rich else 0
        data = request.code.encode() + stdin
        interpreter.send(channel.EXEC, fields or None, data, lambda *answer: self._answered(step, *answer), cap)
        # It runs. What it prints and how it ends we hear in later turns of the loop.
        interpreter.begin(request.limits, lambda: self._stop(step, Status.OUTPUT_LIMIT))
        loop = asyncio.get_running_loop()
        step.timer = loop.call_later(min(LISTEN_S, request.limits.wall_s), self._tick, step)

    def _tick(self, step: Step) -> None:
        """Clocks are ours: wall, CPU, and the time an interrupt is given to work."""
        if self.running is not step:
            return
        self.interpreter.listen()
        self.interpreter.settle()
        now, limits = time.monotonic(), step.request.limits
        if step.stopping is None:
            if now - step.started >= limits.wall_s:
                self._stop(step, Status.TIMEOUT)
            elif self.interpreter.cpu_s() - step.cpu_before >= limits.cpu_s:
                self._stop(step, Status.CPU_LIMIT)
        elif now >= step.kill_at + END_S:
            self._abandon(step)
            return
        elif now >= step.kill_at:
            self.interpreter.kill()
        elif step.kill_at - GRACE_S - step.started < EARLY_S:
            self.interpreter.interrupt()  # the first may have come before the code had begun
        wait = TICK_S if step.stopping else min(TICK_S, max(0.001, step.started + limits.wall_s - now))
        step.timer = asyncio.get_running_loop().call_later(wait, self._tick, step)

    def _stop(self, step: Step, reason: Status) -> None:
        """First KeyboardInterrupt, so that the state is kept; after a grace the kill."""
        if step.stopping is None and self.running is step:
            step.stopping = reason
            step.kill_at = time.monotonic() + GRACE_S
            self.interpreter.interrupt()

    def interrupt(self) -> bool:
        """Raise KeyboardInterrupt in the running execution; False when nothing runs."""
        if self.running is None or not self.running.started:
            return False
        self.interpreter.interrupt()
        return True

    def cancel(self, ident: int) -> None:
        """Whoever asked by message `ident` has gone away."""
        step = self.running
        if step is not None and step.request.ident == ident:  # else theirs has ended, or was refused
            if step.started:
                self._stop(step, Status.CANCELLED)
            step.cancelled = True

    def _answered(self, step: Step, fields: dict[str, Any], body: bytes) -> None:
        """The interpreter says that it is done."""
        if self.running is not step:
            return
        output = self.interpreter.finish()
        if output.flooded and step.stopping is None:
            step.stopping = Status.OUTPUT_LIMIT
        step.cpu_s = self.interpreter.cpu_s() - step.cpu_before
        exception = parse_exception(fields.get("exception"))
        code = fields.get("exit_code")
        outcome = Outcome(Status.OK, attested=False, exit_code=0)
        if step.stopping is not None:
            outcome = Outcome(step.stopping, exception)
        elif exception is not None:
            status = Status.MEMORY_LIMIT if exception.type == "MemoryError" else Status.ERROR
            outcome = Outcome(status, exception, attested=False)
        elif type(code) is int and 0 < code <= 255:  # not True
            outcome = Outcome(Status.EXIT, exit_code=code, attested=False)
        rss = fields.get("rss")
        rss_kib = rss if isinstance(rss, int) and 0 <= rss < _RSS_MAX else 0
        self._conclude(step, outcome, output, rss_kib, parse_display(fields, body)[0] if step.request.rich else [])

    def _conclude(
        self, step: Step, outcome: Outcome, output: Output, rss_kib: int, display: list[dict[str, str]]
    ) -> None:
        """The result, as a reply."""
        stdout, stderr = output.stdout.text(), output.stderr.text()
        exception, unit, request = outcome.exception, self.tree.unit, step.request
        trace = exception.traceback if exception else ""
        profile = unit.settings.profile
        inputs = (request.code, request.stdin, str(self.seed), profile, str(step.number))
        code = str(outcome.exit_code)
        result = {
            "status": outcome.status.value,
            "stdout": stdout,
            "stderr": stderr,
            "exception": exception.__dict__ if exception else None,
            "exit_code": outcome.exit_code,
            "signal": outcome.signal,
            "usage": {
                "wall_ms": round(1e3 * (time.monotonic() - step.started), 3),
                "cpu_ms": round(1e3 * step.cpu_s, 3),
                "queue_ms": round(1e3 * (step.started - step.asked), 3),
                "max_rss_mb": round(rss_kib / 1024, 3),
            },
            "truncated": output.stdout.truncated or output.stderr.truncated,
            "digest": digest(*inputs, outcome.status.value, code, stdout, stderr, trace),
            "attested": outcome.attested,
            "isolation": unit.tier.name,
            "profile": profile,
            "display": display,
            "files": {},
            "step": step.number,
            "alive": not self.ended,
        }
        self.step = step.number
        reply = {"result": result}
        self._reply(step, reply)  # first: somebody waits for it
        size = (
            len(stdout) + len(stderr) + len(trace) + 1024 + sum(len(text) for row in display for text in row.values())
        )
        self.past.add(step.number, request, reply, size)
        self._admission.count(outcome.status.value)
        self._admission.leave(time.monotonic() - step.started)

    def _reply(self, step: Step, reply: Reply) -> None:
        if step.timer is not None:
            step.timer.cancel()
        if self.running is step:
            self.running = None
        self.renew()
        for tell in step.replies:
            tell(reply)
        step.replies.clear()

    # --- the end --------------------------------------------------------------------------------------------------

    def end(self, reason: str) -> None:
        """End the session from outside; whoever waits for an execution is told."""
        if self.ended:
            return
        self.ended = reason
        step = self.running
        if step is not None:
            if step.started:
                self._admission.leave()
            self._reply(
                step, {"error": encode_error(SessionError(f"the session has ended: {reason}", "session_ended"))}
            )
        self.on_end(self)

    def _forged(self, interpreter: Interpreter) -> None:
        """Its process speaks nonsense, or does not listen: only its own code can have done that."""
        if interpreter is not self.interpreter or self.ended:
            return
        interpreter.on_nonsense = None
        if self.running is None:
            self.end(_FORGED)  # before it is dead: an execution that came meanwhile would be killed with it
            return
        if self.running.stopping is None:
            self.running.stopping, self.running.kill_at = Status.ERROR, time.monotonic()
        interpreter.kill()

    def _abandon(self, step: Step) -> None:
        """It was killed and does not end. Its caller and its slot wait no longer; its tree deals with what is left."""
        self.ended = "its process did not end when it was killed"
        self._conclude(step, _stopped(step.stopping or Status.ERROR), self.interpreter.finish(), 0, [])
        self.on_end(self)

    def _exited(self, interpreter: Interpreter) -> None:
        """The process has ended, by itself, by our hand, or with the machine."""
        if interpreter is not self.interpreter or self.ended:
            return
        step = self.running
        if step is None or not step.started:
            self.end("its process has ended")
            return
        self.ended = "its process has ended"
        output = interpreter.finish()
        try:
            status, cpu_us, rss_kib = interpreter.child.exited.result()
            step.cpu_s = max(0.0, cpu_us / 1e6 - step.cpu_before)
            outcome = self._judge(step, status)
        except SandboxError as error:
            if not isinstance(error, SessionError):
                self._admission.count_error(error)
            self._admission.leave()
            self._reply(step, {"error": encode_error(error)})
        else:
            self._conclude(step, outcome, output, rss_kib, [])
        self.on_end(self)

    def _judge(self, step: Step, wait_status: int) -> Outcome:
        if step.stopping is Status.ERROR:
            return _stopped(step.stopping)
        if wait_status == UNKNOWN_STATUS:
            if step.stopping is not None:
                return _stopped(step.stopping)
            if self.tree.copied:  # a copy that ends as soon as it is born is gone before the zygote knows of it
                raise SessionError("the session has ended: its process has ended, nobody saw how", "session_ended")
            raise SandboxInfraError("nobody saw how the execution ended", "lost_child")
        # There is no CPU limit of the kernel's in a session, so no SIGKILL of that kind either: 0.
        ending = Ending(wait_status, 0, step.stopping, b"", related=self.tree.copied)
        if ending.unexplained:
            ending = ending.looked_into(step.kills_before, self.tree.root.group)
        return judge(ending, step.request.limits)


def _stopped(reason: Status) -> Outcome:
    """The outcome of an execution that we have killed."""
    if reason is Status.ERROR:
        return Outcome(Status.ERROR, ExceptionInfo("ControlChannelError", _FORGED, f"{_FORGED}\n"))
    return Outcome(reason)


class Admission:
    """Slots for executions: one for each that runs on this machine's cores, shared with one-shot runs."""

    def __init__(self, slots: Slots, counts: Callable[[str], None]) -> None:
        self._slots, self.count_one = slots, counts
        self._tasks: set[asyncio.Task[None]] = set()

    def enter(self, owner: str, start: Callable[[], None], refuse: Callable[[SandboxError], None]) -> bool:
        """True when a slot was free and is now taken; otherwise `start` is called once there is one, or `refuse`."""
        if self._slots.try_acquire():
            return True
        task = asyncio.get_running_loop().create_task(self._later(owner, start, refuse))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return False

    async def _later(self, owner: str, start: Callable[[], None], refuse: Callable[[SandboxError], None]) -> None:
        try:
            await self._slots.acquire(owner)
        except SandboxError as error:
            refuse(error)
        else:
            start()

    def leave(self, seconds: float = 0.0) -> None:
        """Give the slot back, after having used it for `seconds`."""
        self._slots.release()
        if seconds:
            self._slots.took(seconds)

    def count(self, status: str) -> None:
        """One more execution."""
        self.count_one("executions")
        self.count_one("status:" + status)

    def count_error(self, error: SandboxError) -> None:
        """One more failure of ours."""
        self.count_one("infra_errors")
        self.count_one("infra:" + error.code)

    def close(self) -> None:
        """Forget who waits."""
        for task in self._tasks:
            task.cancel()
