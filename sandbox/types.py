"""The nouns of the sandbox: limits, outcomes, results, errors, and the one interface every sandbox has.

A failure of the *user's code* is a value (`ExecResult.status`). Only our own failures raise (`SandboxError` and below),
so a caller can never mistake a broken machine for a wrong program.
"""

from __future__ import annotations

import copyreg
import math
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable


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
    each stream are kept, and more than `output_kill_bytes` kills the run (status `output_limit`).

    Raises `ValueError` for what is no finite number, or less than 0."""

    wall_s: float = 5.0
    cpu_s: float = 5.0
    memory_mb: int = 512
    processes: int = 16
    file_mb: int = 16
    output_head_bytes: int = 64 * 1024
    output_tail_bytes: int = 16 * 1024
    output_kill_bytes: int = 1024 * 1024
    code_bytes: int = 1024 * 1024

    def __post_init__(self) -> None:
        try:
            for name, value in vars(self).items():
                if not 0 <= value < math.inf:
                    raise ValueError(f"{name} must be a finite number, 0 or more, not {value!r}")
        except TypeError:
            raise ValueError(f"{name} must be a number, not {value!r:.100}") from None


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
    `digest` hashes code, stdin, seed and the observable result. `isolation` names the tier that confined it, `profile`
    the warm interpreter it ran in."""

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
    profile: str = ""
    display: tuple[dict[str, str], ...] = ()
    """Rich results (MIME type -> text, binary as base64), when they were asked for."""
    files: dict[str, bytes] = field(default_factory=dict)
    """The fetched files that exist and are regular, by the name they were asked for."""
    step: int = 0
    """In a session: the number of this execution, from 1."""
    alive: bool = True
    """False when the session ended with this execution (its process was killed or exited)."""

    @property
    def ok(self) -> bool:
        return self.status is Status.OK


class SandboxError(Exception):
    """Our fault, never the code's. `retryable` says whether the same request may succeed later."""

    code = "infra_error"
    retryable = False

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process, as it is: kinds below are not made from their message alone."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


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
    """An execution was lost or could not be confined: spawn_failed, jail_failed, lost_child, oom_host,
    disk_full, no_profile, internal, shutdown."""

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


class SessionError(SandboxError):
    """A session that cannot do what was asked. `code` says why, and stands for an HTTP status:

    `no_session`, `no_snapshot`, `no_file` (404: never existed, or closed), `session_ended` (410: lease expired, killed
    or exited), `step_conflict` (409: `expect_step` leaves a gap), `busy` (409: an execution is under way),
    `fork_unsafe` (409: threads, children or too deep), `fork_unsupported` (409: this tier cannot), `bad_path` (422),
    `too_large` (413), `too_many` (429: sessions or snapshots).
    """

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code
        self.retryable = code in ("busy", "too_many")


@dataclass(frozen=True)
class FileInfo:
    """A regular file of a session's work folder; `size` in bytes."""

    path: str
    size: int


@runtime_checkable
class Session(Protocol):
    """A live interpreter that keeps its state. All methods may raise `SandboxError`, `SessionError` above all.

    One execution at a time. Leases: a session that is not used for its `ttl_s` is ended; every call renews it.
    """

    id: str

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
        expect_step: int | None = None,
        rich: bool = False,
    ) -> ExecResult:
        """Run `code` in the session's state. `expect_step`: the number this execution must get; asking for a step that
        is done returns its stored result, so that a retry never runs twice."""
        ...

    async def fork(self, count: int = 1, *, seeds: Sequence[int] | None = None) -> list[Session]:
        """`count` live copies: state, files and all; each with its own random numbers (from `seeds`, if given)."""
        ...

    async def snapshot(self) -> str:
        """Keep this state; returns the snapshot's id, for `restore` here or `Sandbox.restore`."""
        ...

    async def restore(self, snapshot: str) -> None:
        """Roll this session back to a snapshot of its tree; the session's id stays, its step is the snapshot's."""
        ...

    async def interrupt(self) -> bool:
        """Raise KeyboardInterrupt in the running execution; False when nothing runs."""
        ...

    async def write_file(self, path: str, data: bytes) -> None:
        """Write a file of the work folder; `path` is relative and stays inside."""
        ...

    async def read_file(self, path: str) -> bytes:
        """Read a regular file of the work folder."""
        ...

    async def list_files(self) -> list[FileInfo]:
        """Regular files of the work folder, sorted by path."""
        ...

    async def heartbeat(self) -> float:
        """Renew the lease; returns the seconds it lasts."""
        ...

    async def close(self) -> None:
        """End the session. May be called twice."""
        ...


class SessionOpening:
    """What `Sandbox.session` returns: await it for a session, or enter it for one that is closed at the end."""

    def __init__(self, opening: Callable[[], Coroutine[Any, Any, Session]]) -> None:
        self._opening = opening
        self._session: Session | None = None

    def __await__(self) -> Generator[Any, None, Session]:
        return self._opening().__await__()

    async def __aenter__(self) -> Session:
        self._session = await self._opening()
        return self._session

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()


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
        profile: str | None = None,
        files: Mapping[str, bytes] | None = None,
        fetch: Sequence[str] = (),
        rich: bool = False,
        deadline_s: float | None = None,
    ) -> ExecResult:
        """Run `code` in a fresh interpreter state.

        `profile`: another warm interpreter than the default. `files`: put into the work folder first. `fetch`: paths to
        bring back. `rich`: show the last expression in `display` instead of on standard output. `deadline_s`: give up
        with `SandboxOverloaded` rather than wait longer than this in the queue.
        """
        ...

    def session(
        self,
        *,
        profile: str | None = None,
        limits: Limits | None = None,
        seed: int = 0,
        ttl_s: float = 600.0,
        idempotency_key: str | None = None,
    ) -> SessionOpening:
        """Open a session: `session = await box.session()`, or `async with box.session() as session`.

        `limits`: defaults of its executions; `memory_mb` and `processes` hold for its whole life.
        """
        ...

    async def attach(self, session_id: str) -> Session:
        """A handle of a session that is open already. Raises `SessionError(no_session)`."""
        ...

    async def restore(self, snapshot: str, *, count: int = 1, seeds: Sequence[int] | None = None) -> list[Session]:
        """New sessions from a snapshot; it stays and may be used again."""
        ...

    async def drop_snapshot(self, snapshot: str) -> None:
        """Forget a snapshot."""
        ...

    async def stats(self) -> dict[str, Any]:
        """Counters since the start, and what is going on now."""
        ...

    async def capabilities(self) -> dict[str, Any]:
        """`tier`, `profiles`, `fork` (whether sessions can), `properties` (what the tier was shown to protect),
        `limits` (defaults), `cgroup`, `workers`, `version`."""
        ...
