"""The nouns of the sandbox: limits, outcomes, results, errors, and the one interface every sandbox has.

A failure of the *user's code* is a value (`ExecResult.status`). Only our own failures raise (`SandboxError` and below),
so a caller can never mistake a broken machine for a wrong program.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Protocol, Self, runtime_checkable


class Status(StrEnum):
    """How an execution ended. `infra_error` never appears in a result: it is raised."""

    OK = "ok"
    ERROR = "error"  # the code raised
    EXIT = "exit"  # the code called exit with a non-zero code
    SIGNAL = "signal"  # died of a signal it caused itself
    TIMEOUT = "timeout"  # wall clock
    CPU_LIMIT = "cpu_limit"
    MEMORY_LIMIT = "memory_limit"
    OUTPUT_LIMIT = "output_limit"
    REJECTED = "rejected"  # never ran: too large, not text, ...
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Limits:
    """What one execution may use. Output: the first `output_head_bytes` and the last `output_tail_bytes` of
    each stream are kept, and more than `output_kill_bytes` kills the run (status `output_limit`)."""

    wall_s: float = 5.0
    cpu_s: float = 5.0
    memory_mb: int = 512
    processes: int = 16
    file_mb: int = 16
    output_head_bytes: int = 64 * 1024
    output_tail_bytes: int = 16 * 1024
    output_kill_bytes: int = 1024 * 1024
    code_bytes: int = 1024 * 1024


@dataclass(frozen=True)
class ExceptionInfo:
    """A Python exception of the user's code; `traceback` shows user frames only."""

    type: str
    message: str
    traceback: str


@dataclass(frozen=True)
class Usage:
    """Milliseconds and MiB."""

    wall_ms: float = 0.0
    cpu_ms: float = 0.0
    queue_ms: float = 0.0
    max_rss_mb: float = 0.0


@dataclass(frozen=True)
class ExecResult:
    """What one execution did. `attested`: the status follows from the wait status, not from what the runner said.
    `digest` hashes code, stdin, seed and the observable result. `isolation` names the tier that confined it."""

    status: Status
    stdout: str = ""
    stderr: str = ""
    exception: ExceptionInfo | None = None
    exit_code: int | None = None
    signal: int | None = None
    usage: Usage = field(default_factory=Usage)
    truncated: bool = False
    digest: str = ""
    attested: bool = True
    isolation: str = ""

    @property
    def ok(self) -> bool:
        return self.status is Status.OK


class SandboxError(Exception):
    """Our fault, never the code's. `retryable` says whether the same request may succeed later."""

    code = "infra_error"
    retryable = False


class SandboxUnavailable(SandboxError):
    """The supervisor cannot be reached or died."""

    code = "unavailable"
    retryable = True


class SandboxOverloaded(SandboxError):
    """The queue is full; `retry_after` in seconds."""

    code = "overloaded"
    retryable = True

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class SandboxInfraError(SandboxError):
    """An execution was lost or could not be confined: spawn_failed, jail_failed, lost_child, oom_host, shutdown."""

    def __init__(self, message: str, code: str, retryable: bool = True) -> None:
        super().__init__(message)
        self.code = code
        self.retryable = retryable


class SandboxProtocolError(SandboxError):
    """The other side spoke nonsense."""

    code = "protocol"


class ConfinementUnavailable(SandboxError):
    """This machine cannot give a required property; the message holds the reason and the fix. Never retryable."""

    code = "confinement_unavailable"


@runtime_checkable
class Sandbox(Protocol):
    """One interface for embedded, remote and containerised sandboxes. All methods may raise `SandboxError`."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None: ...

    async def exec(
        self,
        code: str,
        *,
        stdin: str = "",
        limits: Limits | None = None,
        seed: int = 0,
        idempotency_key: str | None = None,
    ) -> ExecResult:
        """Run `code` in a fresh interpreter state."""
        ...
