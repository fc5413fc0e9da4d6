"""How a run ended, from what the kernel says. The report of the child only adds words."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from sandbox.types import ExceptionInfo, Limits, SandboxInfraError, Status


@dataclass(frozen=True)
class Ending:
    """Facts about the end of a run. `killed_for`: why we killed it, when we did. `oom`: host OOM kills meanwhile."""

    wait_status: int
    cpu_us: int
    killed_for: Status | None
    report: bytes
    oom: int


@dataclass(frozen=True)
class Outcome:
    """The typed end of a run. `attested`: the status follows from the wait status or from our own kill."""

    status: Status
    exception: ExceptionInfo | None = None
    exit_code: int | None = None
    signal: int | None = None
    attested: bool = True


def parse_report(data: bytes) -> ExceptionInfo | None:
    """What the child said about an exception; anything malformed is nothing."""
    try:
        report = json.loads(data)
        fields = [report["type"], report["message"], report["traceback"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not all(isinstance(field, str) for field in fields):
        return None
    return ExceptionInfo(*(field.encode("utf-8", "replace").decode() for field in fields))


def judge(ending: Ending, limits: Limits) -> Outcome:
    """The outcome. Raises `SandboxInfraError` when a SIGKILL is not explained by us or by the CPU limit."""
    if ending.killed_for is not None:
        return Outcome(ending.killed_for)
    if os.WIFEXITED(ending.wait_status):
        code = os.WEXITSTATUS(ending.wait_status)
        if code == 0:
            return Outcome(Status.OK, exit_code=0)
        exception = parse_report(ending.report) if code == 1 else None
        if exception is None:
            return Outcome(Status.EXIT, exit_code=code)
        status = Status.MEMORY_LIMIT if exception.type == "MemoryError" else Status.ERROR
        return Outcome(status, exception, exit_code=code, attested=False)
    number = os.WTERMSIG(ending.wait_status)
    # The kernel counts ticks for the limit and nanoseconds for the usage; on a busy host they differ by a fifth.
    if number == signal.SIGXCPU or (number == signal.SIGKILL and ending.cpu_us >= 0.5e6 * max(1.0, limits.cpu_s)):
        return Outcome(Status.CPU_LIMIT, signal=number)
    if number == signal.SIGKILL:
        if ending.oom:
            raise SandboxInfraError("the machine ran out of memory during the run", "oom_host")
        raise SandboxInfraError("the run was killed from outside", "lost_child")
    return Outcome(Status.SIGNAL, signal=number)


def oom_kills() -> int:
    """OOM kills on this machine since boot, containers' own limits included; 0 where the kernel does not say."""
    try:
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def digest(*parts: str) -> str:
    """SHA-256 over length-prefixed parts, so that no two different runs share the bytes."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(8, "big") + data)
    return state.hexdigest()
