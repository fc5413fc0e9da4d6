"""How a run ended, from what the kernel says. The report of the child only adds words."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sandbox.supervisor.cgroups import Group, kills
from sandbox.types import ExceptionInfo, Limits, SandboxInfraError, Status
from sandbox.worker.channel import DONE, FRAME, HEAD_BYTES
from sandbox.worker.display import DISPLAYS_MAX, KIND_MAX, REPRESENTATIONS_MAX, RESULT_BYTES, weight


@dataclass(frozen=True)
class Kills:
    """How often the kernel had killed for want of memory: on the machine, and in each of our control groups."""

    machine: int
    groups: dict[Group | None, int]

    def since(self, before: Kills, group: Group | None) -> tuple[int, int]:
        """Kills from `before` until now: outside our control groups, and in `group`."""
        ours = sum(self.groups.values()) - sum(before.groups.values())
        own = self.groups[group] - max(before.groups.get(group, 0), group.lent_at) if group is not None else 0
        return self.machine - before.machine - ours, own


NO_KILLS = Kills(0, {})


@dataclass(frozen=True)
class Ending:
    """Facts about the end of a run. `killed_for`: why we killed it, when we did. `report`: what the child said about an
    exception. `oom`: host OOM kills meanwhile. `over_limit`: the kernel killed in the run's
    own control group. `related`: there are or were copies of it, or it is one; they might have killed it."""

    wait_status: int
    cpu_us: int
    killed_for: Status | None
    report: Any
    oom: int = 0
    over_limit: bool = False
    related: bool = False

    @property
    def unexplained(self) -> bool:
        """Whether it was a SIGKILL that we did not send."""
        killed = os.WIFSIGNALED(self.wait_status) and os.WTERMSIG(self.wait_status) == signal.SIGKILL
        return killed and self.killed_for is None

    def looked_into(self, before: Kills, group: Group | None) -> Ending:
        """With what the kernel's counters say about such a kill."""
        machine = oom_kills()  # first: a kill meanwhile is then one of ours at most
        outside, own = Kills(machine, kills()).since(before, group)
        return replace(self, oom=max(0, outside), over_limit=own > 0)


@dataclass(frozen=True)
class Outcome:
    """The typed end of a run. `attested`: the status follows from the wait status or from our own kill."""

    status: Status
    exception: ExceptionInfo | None = None
    exit_code: int | None = None
    signal: int | None = None
    attested: bool = True


def parse_frame(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The one frame of a run's report (`worker/channel.py`): fields and data; anything malformed is nothing."""
    if len(data) < FRAME.size:
        return {}, b""
    kind, _, head, body = FRAME.unpack_from(data)
    if kind != DONE or head > HEAD_BYTES or len(data) != FRAME.size + head + body:
        return {}, b""
    fields = parse_head(data[FRAME.size : FRAME.size + head])
    return (fields, data[len(data) - body :]) if fields is not None else ({}, b"")


def parse_head(data: bytes) -> dict[str, Any] | None:
    """The JSON of a frame; None when it is no object, or no UTF-8."""
    try:
        fields = json.loads(data.decode()) if data else {}
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def parse_files(fields: dict[str, Any], body: bytes, asked: Sequence[str]) -> dict[str, bytes]:
    """Files that the child sent: only what was asked for. The table holds numbers of names, and sizes."""
    files: dict[str, bytes] = {}
    offset = 0
    table = fields.get("files")
    for row in table if isinstance(table, list) else []:
        match row:
            case [int(number), int(size)] if 0 <= number < len(asked) and 0 <= size <= len(body) - offset:
                files[asked[number]] = body[offset : offset + size]
                offset += size
            case _:
                return {}
    return files


def parse_exception(fields: Any) -> ExceptionInfo | None:
    """An exception out of type, message and traceback; anything malformed is nothing."""
    try:
        texts = [fields["type"], fields["message"], fields["traceback"]]
    except (KeyError, TypeError, IndexError):
        return None
    if not all(isinstance(text, str) for text in texts):
        return None
    return ExceptionInfo(*(_plain(text) for text in texts))


def parse_display(fields: dict[str, Any], body: bytes) -> tuple[list[dict[str, str]], int]:
    """Rich results that the child reported, and how much of `body` they take; files may follow.

    A text that is too large is left out. Where the table makes no sense, neither does anything that follows.
    """
    nothing: tuple[list[dict[str, str]], int] = [], len(body)
    table = fields.get("display", [])
    if not isinstance(table, list) or len(table) > DISPLAYS_MAX:
        return nothing
    results, offset = [], 0
    for row in table:
        if not isinstance(row, list) or len(row) > REPRESENTATIONS_MAX:
            return nothing
        found, room = {}, RESULT_BYTES
        for entry in row:
            match entry:
                case [str(kind), int(size)] if len(kind) <= KIND_MAX and 0 <= size <= len(body) - offset:
                    text = body[offset : offset + size]
                    offset += size
                case _:
                    return nothing
            room -= weight(text)
            if room >= 0:
                with contextlib.suppress(UnicodeDecodeError):
                    found[_plain(kind)] = text.decode()
        if found:
            results.append(found)
    return results, offset


def _plain(text: str) -> str:
    """Without lone surrogates."""
    return text.encode("utf-8", "replace").decode()


def judge(ending: Ending, limits: Limits) -> Outcome:
    """The outcome. Raises `SandboxInfraError` when a SIGKILL is not explained by us, a limit, or relatives of it."""
    if ending.killed_for is not None:
        return Outcome(ending.killed_for)
    if os.WIFEXITED(ending.wait_status):
        code = os.WEXITSTATUS(ending.wait_status)
        if code == 0:
            return Outcome(Status.OK, exit_code=0)
        exception = parse_exception(ending.report) if code == 1 else None
        if exception is None:
            return Outcome(Status.EXIT, exit_code=code)
        status = Status.MEMORY_LIMIT if exception.type == "MemoryError" else Status.ERROR
        return Outcome(status, exception, exit_code=code, attested=False)
    number = os.WTERMSIG(ending.wait_status)
    # The kernel counts ticks for the limit and nanoseconds for the usage; on a busy host they differ by a fifth.
    if number == signal.SIGXCPU or (number == signal.SIGKILL and ending.cpu_us >= 0.5e6 * max(1.0, limits.cpu_s)):
        return Outcome(Status.CPU_LIMIT, signal=number)
    if number == signal.SIGKILL:
        if ending.over_limit:
            return Outcome(Status.MEMORY_LIMIT, signal=number)
        if ending.oom:
            raise SandboxInfraError("the machine ran out of memory during the run", "oom_host")
        if ending.related:  # their code shares memory with the one who should have locked that up
            return Outcome(Status.SIGNAL, signal=number, attested=False)
        raise SandboxInfraError("the run was killed from outside", "lost_child")
    return Outcome(Status.SIGNAL, signal=number)


class OomWatch:
    """The counters of memory kills as they were when a run began, or a second before: reading them is dear."""

    def __init__(self) -> None:
        self._read_at = -math.inf
        self._before = NO_KILLS

    def begin(self) -> Kills:
        """The counters, at most a second old."""
        now = time.monotonic()
        if now - self._read_at > 1.0:
            groups = kills()  # first, as they are read last in the end: a kill meanwhile is not the machine's
            self._read_at, self._before = now, Kills(oom_kills(), groups)
        return self._before


def oom_kills() -> int:
    """OOM kills on this machine since boot, containers' own limits included; 0 where the kernel does not say."""
    try:
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


OOM_WATCH = OomWatch()


def digest(*parts: str) -> str:
    """SHA-256 over length-prefixed parts, so that no two different runs share the bytes."""
    encoded = [part.encode("utf-8", "surrogatepass") for part in parts]
    return hashlib.sha256(b"".join([len(data).to_bytes(8, "big") + data for data in encoded])).hexdigest()
