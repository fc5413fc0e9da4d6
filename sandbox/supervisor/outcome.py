"""How a run ended, from what the kernel says. The report of the child only adds words."""

from __future__ import annotations

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

from sandbox.supervisor.cgroups import Group
from sandbox.types import ExceptionInfo, Limits, SandboxInfraError, Status
from sandbox.worker.channel import DONE, FRAME


@dataclass(frozen=True)
class Ending:
    """Facts about the end of a run. `killed_for`: why we killed it, when we did. `report`: what the child said about an
    exception. `oom`: host OOM kills meanwhile. `over_limit`: the kernel killed in the run's
    own control group."""

    wait_status: int
    cpu_us: int
    killed_for: Status | None
    report: Any
    oom: int = 0
    over_limit: bool = False

    @property
    def unexplained(self) -> bool:
        """Whether it was a SIGKILL that we did not send."""
        killed = os.WIFSIGNALED(self.wait_status) and os.WTERMSIG(self.wait_status) == signal.SIGKILL
        return killed and self.killed_for is None

    def looked_into(self, ooms_before: int, group: Group | None) -> Ending:
        """With what the kernel's counters say about such a kill."""
        over_limit = group is not None and group.killed()
        return replace(self, oom=oom_kills() - ooms_before, over_limit=over_limit)


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
    if kind != DONE or len(data) != FRAME.size + head + body:
        return {}, b""
    try:
        fields = json.loads(data[FRAME.size : FRAME.size + head])
    except (ValueError, RecursionError):
        return {}, b""
    return (fields, data[len(data) - body :]) if isinstance(fields, dict) else ({}, b"")


def parse_files(fields: dict[str, Any], body: bytes, asked: Sequence[str]) -> dict[str, bytes]:
    """Files that the child sent: only what was asked for."""
    files: dict[str, bytes] = {}
    offset = 0
    table = fields.get("files")
    for row in table if isinstance(table, list) else []:
        if not isinstance(row, list) or len(row) != 2 or row[0] not in asked or not isinstance(row[1], int):
            return {}
        if not 0 <= row[1] <= len(body) - offset:
            return {}
        files[row[0]] = body[offset : offset + row[1]]
        offset += row[1]
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


def parse_display(fields: dict[str, Any]) -> list[dict[str, str]]:
    """Rich results that the child reported; what is malformed is left out."""
    rows = fields.get("display")
    if not isinstance(rows, list):
        return []
    found = [
        {_plain(kind): _plain(text) for kind, text in row.items() if isinstance(text, str)}
        for row in rows
        if isinstance(row, dict)
    ]
    return [row for row in found if row]


def _plain(text: str) -> str:
    """Without lone surrogates."""
    return text.encode("utf-8", "replace").decode()


def judge(ending: Ending, limits: Limits) -> Outcome:
    """The outcome. Raises `SandboxInfraError` when a SIGKILL is not explained by us or by the CPU limit."""
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
        raise SandboxInfraError("the run was killed from outside", "lost_child")
    return Outcome(Status.SIGNAL, signal=number)


class OomWatch:
    """The machine's counter of memory kills as it was when a run began, or a second before: reading it is dear."""

    def __init__(self) -> None:
        self._read_at = -math.inf
        self._before = 0

    def begin(self) -> int:
        """The counter, at most a second old."""
        now = time.monotonic()
        if now - self._read_at > 1.0:
            self._read_at, self._before = now, oom_kills()
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
