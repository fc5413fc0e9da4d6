"""One execution: hand the job to a ready child, pump its output, time it, end it, and say what happened."""

from __future__ import annotations

import asyncio
import errno
import functools
import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandbox import paths
from sandbox.supervisor import cores
from sandbox.supervisor.outcome import (
    OOM_WATCH,
    Ending,
    Outcome,
    digest,
    judge,
    parse_display,
    parse_files,
    parse_frame,
)
from sandbox.supervisor.pump import Pump, Stream, write_all, write_some
from sandbox.supervisor.unit import Child, Unit
from sandbox.types import ExecResult, Limits, SandboxInfraError, Status, Usage
from sandbox.worker import channel
from sandbox.worker.display import DISPLAY_BYTES
from sandbox.worker.runner import JOB_HEADER

_REPORT_BYTES = channel.FRAME.size + channel.HEAD_BYTES
_NO_ROOM = (f"[Errno {errno.ENOSPC}]", f"[Errno {errno.EDQUOT}]")
_PATIENCE_S = (0.001, 0.01, 0.1, 0.5)


@dataclass(frozen=True)
class Job:
    """What is to be run. `code` is known to be encodable."""

    code: str
    stdin: str
    seed: int
    limits: Limits
    files: dict[str, bytes] = field(default_factory=dict)
    fetch: tuple[str, ...] = ()
    rich: bool = False

    def payload(self, others: int = 0) -> bytes:
        """As the child reads it. `others`: processes of the same user that count against its limit."""
        code, stdin = self.code.encode(), self.stdin.encode("utf-8", "surrogateescape")
        limits = self.limits
        settings: dict[str, Any] = {
            "memory_mb": limits.memory_mb,
            "processes": limits.processes + others,
            "file_mb": limits.file_mb,
            "cpu_s": max(1, math.ceil(limits.cpu_s)),
            "seed": self.seed,
            "stdin_size": len(stdin),
        }
        if self.files:
            settings["files"] = [(path, len(data)) for path, data in self.files.items()]
        if self.fetch:
            settings |= {"fetch": self.fetch, "fetch_cap": paths.MAX_BYTES}
        if self.rich:
            settings["rich"] = True
        head = json.dumps(settings).encode()
        return JOB_HEADER.pack(len(head), len(code)) + head + code + stdin + b"".join(self.files.values())

    @property
    def report_bytes(self) -> int:
        """The largest report that can be right."""
        return (
            _REPORT_BYTES
            + len(channel.WRITTEN)
            + (paths.MAX_BYTES if self.fetch else 0)
            + (DISPLAY_BYTES if self.rich else 0)
        )


def neighbours(unit: Unit) -> int:
    """Threads that RLIMIT_NPROC counts besides a run's own, where runs share their user with each other and with us:
    those of a second ago, and what other runs may have begun since."""
    if unit.tier.namespaces or unit.tier.own_uid:
        return 0
    workers = unit.settings.workers
    begun = (workers - 1) * unit.settings.limits.processes + 4 * workers  # also ready children, and who clears up
    return _own_threads(int(time.monotonic())) + begun


@functools.lru_cache(maxsize=1)
def _own_threads(second: int) -> int:
    """`second` only makes the answer expire."""
    count = 0
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and entry.stat().st_uid == os.geteuid():
                count += sum(1 for _ in (entry / "task").iterdir())
        except OSError:
            continue
    return count


class Run:
    """Runs one job in one child. `cancel()` ends it early."""

    def __init__(self, unit: Unit, child: Child, job: Job) -> None:
        self.unit, self.child, self.job = unit, child, job
        self._killed_for: Status | None = None
        self._crowded = False  # the disk was full before it began
        self._began = not job.files  # its files are written: what it reports may be its code's word
        self._bound = False  # to one processor
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        limits = job.limits
        self.stdout = Stream(limits.output_head_bytes, limits.output_tail_bytes)
        self.stderr = Stream(limits.output_head_bytes, limits.output_tail_bytes)
        self.report = Stream(job.report_bytes, 0)
        self.pump = Pump(limits.output_kill_bytes, lambda: self._stop(Status.OUTPUT_LIMIT))
        self.talk = Pump(job.report_bytes + _REPORT_BYTES, lambda: self._stop(Status.OUTPUT_LIMIT))

    def _stop(self, reason: Status) -> None:
        if self._killed_for is None and not self.child.exited.done():
            self._killed_for = reason
        self._finish()

    def _finish(self) -> None:
        if not self._end.done():
            self._end.set_result(None)

    @property
    def killed(self) -> bool:
        """Whether it was we who ended it."""
        return self._killed_for is not None

    def cancel(self) -> None:
        """End the run with status `cancelled`."""
        self._stop(Status.CANCELLED)

    async def execute(self, queue_ms: float) -> ExecResult:
        """Run to the end of the program itself. Raises `SandboxInfraError` when the end is our fault.

        Whatever the program started may live on until `clean`, which must follow.
        """
        child = self.child
        ooms = OOM_WATCH.begin()
        if child.group is not None:
            child.group.limit(self.unit.group_mib(self.job.limits))
        self._crowded = self.unit.crowded(sum(map(len, self.job.files.values())))
        started = time.monotonic()
        rest = write_some(child.job, self.job.payload(neighbours(self.unit)))  # first: from here on it runs
        child.on_exit = self._finish
        if child.exited.done():
            self._finish()
        self._watch(started, cores.LOOK_S)
        self.pump.attach(child.stdout, self.stdout)
        self.pump.attach(child.stderr, self.stderr)
        self.talk.attach(child.report, self.report)
        feeding = asyncio.ensure_future(write_all(child.job, rest)) if rest else None
        try:
            await self._end
        finally:
            self._timer.cancel()
            if feeding is not None:
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)
        wall = time.monotonic() - started
        try:
            await self.unit.end(child)
        except TimeoutError:
            raise SandboxInfraError("the run could not be ended", "lost_child") from None
        self.pump.sip()
        self.talk.sip()
        status, cpu_us, rss_kib = child.exited.result()
        if self.pump.flooded and self._killed_for is None:
            self._killed_for = Status.OUTPUT_LIMIT
        said = bytes(self.report.head)
        if self.job.files and said.startswith(channel.WRITTEN):
            self._began, said = True, said[len(channel.WRITTEN) :]
        report, body = parse_frame(said)
        ending = Ending(status, cpu_us, self._killed_for, report.get("exception"))
        if ending.unexplained:
            ending = ending.looked_into(ooms, child.group)
        usage = Usage(1e3 * wall, cpu_us / 1e3, queue_ms, rss_kib / 1024)
        return self._result(ending, usage, report, body)

    def _watch(self, started: float, pause: float) -> None:
        """End it at its limit; until then look at it now and then, if it lasts."""
        left = started + self.job.limits.wall_s - time.monotonic()
        loop = asyncio.get_running_loop()
        if left <= pause:
            self._timer = loop.call_later(left, self._stop, Status.TIMEOUT)
        else:
            self._timer = loop.call_later(pause, self._look, started)

    def _look(self, started: float) -> None:
        self._bound = cores.settle(self.child.process, self._bound)
        self._watch(started, cores.NEXT_LOOK_S)

    async def clean(self) -> bool:
        """Kill everything that is left of the run and let go of it; True when nothing is."""
        try:
            dead = await self.unit.kill(self.child)
            if dead:
                await self._closed()
        finally:
            self.pump.drain()
            self.talk.drain()
            self.child.close()
        # With a lost unit its warden is killing everything; a pipe may then be open for a moment longer.
        return dead and (self.pump.unclosed == 0 or self.unit.lost.is_set())

    async def _closed(self) -> None:
        """Until the output has no writer any more, which may take the kernel a moment longer than the writers' end."""
        for pause in _PATIENCE_S:
            self.pump.sip()
            if not self.pump.reading or self.unit.lost.is_set():
                return
            await asyncio.sleep(pause)

    def _result(self, ending: Ending, usage: Usage, report: dict[str, Any], body: bytes) -> ExecResult:
        outcome = judge(ending, self.job.limits)
        unwritten = None if self._began else report.get("unwritten")
        failed = outcome.exception.message if outcome.exception and outcome.exception.type == "OSError" else ""
        if self._crowded and (isinstance(unwritten, str) or failed.startswith(_NO_ROOM)):
            raise SandboxInfraError("the disk that runs write to was full before this one began", "disk_full")
        if isinstance(unwritten, str):
            outcome = Outcome(Status.REJECTED, attested=False)
            self.stderr.feed(f"files: {unwritten}"[:4096].encode("utf-8", "replace"))
        stdout, stderr = self.stdout.text(), self.stderr.text()
        trace = outcome.exception.traceback if outcome.exception else ""
        inputs = (self.job.code, self.job.stdin, str(self.job.seed), self.unit.settings.profile)
        display, used = parse_display(report, body) if self.job.rich else ([], 0)
        return ExecResult(
            status=outcome.status,
            stdout=stdout,
            stderr=stderr,
            exception=outcome.exception,
            exit_code=outcome.exit_code,
            signal=outcome.signal,
            usage=usage,
            truncated=self.stdout.truncated or self.stderr.truncated,
            digest=digest(*inputs, outcome.status.value, str(outcome.exit_code), stdout, stderr, trace),
            attested=outcome.attested,
            isolation=self.unit.tier.name,
            profile=self.unit.settings.profile,
            display=tuple(display),
            files=parse_files(report, body[used:], self.job.fetch),
        )
