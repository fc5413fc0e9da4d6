"""A session on a server. Calls that change it carry a key, executions their step: a retry after a lost answer takes
effect exactly once."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from sandbox.arguments import check_copies, check_file, check_id, check_path, check_program, check_size, check_step
from sandbox.codec import dumps, parse_files
from sandbox.remote_batch import exec_result
from sandbox.remote_endpoint import Answer, Endpoint, LostRequest, Nonsense, Parse, Value
from sandbox.types import (
    ExecResult,
    FileInfo,
    Limits,
    SandboxError,
    SandboxProtocolError,
    SandboxUnavailable,
    Session,
    SessionError,
)

if TYPE_CHECKING:
    from sandbox.remote import RemoteSandbox

_FORK_S = 120.0
_JSON = {"Content-Type": "application/json"}


Described = tuple[str, int]
"""A session's id, and the number of its last execution."""


def _described(answer: Answer) -> Described:
    return _row(answer.fields())


def _row(fields: Any) -> Described:
    try:
        return str(fields["id"]), int(fields["step"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise SandboxProtocolError(f"the server sent a malformed session: {error!r:.200}") from None


def _all_described(answer: Answer) -> list[Described]:
    rows = answer.fields().get("sessions")
    if not isinstance(rows, list):
        raise SandboxProtocolError("the server sent no sessions")
    return [_row(row) for row in rows]


def _snapshot(answer: Answer) -> str:
    ident = answer.fields().get("snapshot")
    if not isinstance(ident, str):
        raise SandboxProtocolError("the server sent no snapshot id")
    return ident


def _lease(answer: Answer) -> float:
    try:
        return float(answer.fields()["lease_s"])
    except (KeyError, TypeError, ValueError):
        raise SandboxProtocolError("the server sent no lease") from None


def _files(answer: Answer) -> list[FileInfo]:
    return parse_files(answer.fields())


Ask = Callable[[], Awaitable[list[Session]]]
"""A request for new sessions; made again, it brings the same ones."""


async def made(box: RemoteSandbox, ask: Ask) -> list[Session]:
    """The sessions that `ask` brings. Those that nobody waits for any more when they come are closed."""
    try:
        return await ask()
    except asyncio.CancelledError:
        box.leave(_close(ask))
        raise


async def _close(ask: Ask) -> None:
    with contextlib.suppress(SandboxError, ValueError):
        for session in await ask():
            await session.close()


def opener(box: RemoteSandbox, fields: dict[str, Any]) -> Ask:
    """Asks for a new session on the server with the fewest of ours; on another when that one fails or has no room."""
    prefer: Endpoint | None = None
    shun: Endpoint | None = None
    full: set[Endpoint] = set()
    body = dumps(fields)

    async def attempt(left: float) -> tuple[Endpoint, Described]:
        nonlocal prefer, shun
        endpoint = await box.pick(left, prefer, full, shun=shun, sticky=True)
        prefer, shun = None, endpoint
        try:
            seconds = min(left, 60.0)
            return endpoint, await endpoint.ask(
                "POST", "/v1/sessions", _described, body, seconds=seconds, headers=_JSON
            )
        except (LostRequest, asyncio.CancelledError) as lost:
            if not isinstance(lost, LostRequest) or (lost.sent and not lost.late):
                prefer, shun = endpoint, None  # a session may have been opened there: the key finds it
            raise
        except SessionError as error:
            if error.code != "too_many" or len(full) + 1 >= len(box.endpoints):
                raise
            full.add(endpoint)
            raise SandboxUnavailable(f"{endpoint.url}: {error}") from error

    async def ask() -> list[Session]:
        endpoint, described = await box.persist(attempt, box.total_s)
        wall_s = float(fields.get("limits", {}).get("wall_s", box.default_wall_s))
        return [RemoteSession(box, endpoint, *described, wall_s)]

    return ask


async def restore_sessions(box: RemoteSandbox, snapshot: str, count: int, seeds: list[int] | None) -> list[Session]:
    """New sessions, where the snapshot is."""
    fields: dict[str, Any] = {"count": count, "idempotency_key": secrets.token_hex(16)}
    if seeds is not None:
        fields["seeds"] = seeds
    path = f"/v1/snapshots/{quote(snapshot, safe='')}/restore"

    async def ask() -> list[Session]:
        endpoint, rows = await box.everywhere("POST", path, "no_snapshot", _all_described, fields, seconds=60.0)
        return [RemoteSession(box, endpoint, *row, box.default_wall_s) for row in rows]

    return await made(box, ask)


class RemoteSession:
    """A handle of a session. It counts steps for itself: let one handle write, or pass `expect_step`.

    A cancelled `exec` is interrupted, unless `expect_step` says that somebody may come back for it; later calls wait
    until it has ended.
    """

    def __init__(self, box: RemoteSandbox, endpoint: Endpoint, ident: str, step: int, wall_s: float) -> None:
        self.id = ident
        self.step = step
        self._box, self._endpoint, self._wall_s = box, endpoint, wall_s
        self._path = f"/v1/sessions/{quote(ident, safe='')}"
        self._executing = False
        self._unsure = False  # whether an execution may have taken a step that we do not know of
        self._settling: asyncio.Task[None] | None = None
        self._closed = False
        endpoint.sessions += 1

    @classmethod
    async def find(cls, box: RemoteSandbox, ident: str) -> RemoteSession:
        """A handle of a session that is open. Raises `SessionError` (no_session)."""
        path = f"/v1/sessions/{quote(ident, safe='')}"
        endpoint, described = await box.everywhere("GET", path, "no_session", _described)
        return cls(box, endpoint, *described, box.default_wall_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def _at(
        self,
        method: str,
        path: str,
        parse: Parse[Value],
        body: dict[str, Any] | bytes | None = None,
        seconds: float = 60.0,
    ) -> Value:
        await self._settled()
        return await self._box.at(self._endpoint, method, path, parse, body, seconds=seconds)

    async def _post(self, what: str, parse: Parse[Value], fields: dict[str, Any] | None = None) -> Value:
        body = {**(fields or {}), "idempotency_key": secrets.token_hex(16)}
        return await self._at("POST", f"{self._path}/{what}", parse, body)

    async def exec(
        self,
        code: str,
        *,
        stdin: str = "",
        limits: Limits | None = None,
        expect_step: int | None = None,
        rich: bool = False,
    ) -> ExecResult:
        """As `Session.exec`. Without `expect_step`, the step after the last that this handle knows is expected."""
        check_program(code, stdin, limits)
        check_step(expect_step)
        await self._settled()
        if self._executing and expect_step is None:
            raise SessionError("an execution is under way in this session", "busy")
        fields: dict[str, Any] = {"code": code}
        optional = {"stdin": stdin, "limits": asdict(limits) if limits is not None else None, "rich": bool(rich)}
        fields |= {name: value for name, value in optional.items() if value}
        seconds = (limits.wall_s if limits is not None else self._wall_s) + 40.0
        self._executing = True
        try:
            if expect_step is not None:
                return await self._run(fields, expect_step, seconds, abandon=False)
            try:
                return await self._run(fields, self.step + 1, seconds)
            except SessionError as error:
                if error.code != "step_conflict" or not self._unsure:
                    raise
            # An execution whose answer was lost took that step, and this is another program.
            _, self.step = await self._box.at(self._endpoint, "GET", self._path, _described)
            return await self._run(fields, self.step + 1, seconds)
        finally:
            self._executing = False

    async def _run(self, fields: dict[str, Any], step: int, seconds: float, *, abandon: bool = True) -> ExecResult:
        """Step `step`. `abandon`: a cancelled caller wants no more of it."""
        body = dumps({**fields, "expect_step": step, "idempotency_key": secrets.token_hex(16)})
        check_size(len(body))
        box, endpoint = self._box, self._endpoint
        sent = False

        async def attempt(left: float) -> ExecResult:
            nonlocal sent
            if not endpoint.breaker.closed:
                await box.usable(endpoint, left)
            sent = True
            most = min(left, seconds)
            return await endpoint.ask("POST", f"{self._path}/exec", exec_result, body, seconds=most, headers=_JSON)

        def ask() -> Coroutine[Any, Any, ExecResult]:
            return box.persist(attempt, min(box.total_s, 2 * seconds), among=[endpoint])

        try:
            result = await ask()
        except asyncio.CancelledError:
            self._unsure = self._unsure or sent
            if sent and abandon:
                self._settling = box.leave(self._settle(ask))
            raise
        except (SandboxUnavailable, Nonsense):
            self._unsure = self._unsure or sent
            raise
        self._done(result)
        return result

    def _done(self, result: ExecResult) -> None:
        self.step, self._unsure = max(self.step, result.step), False

    async def _settle(self, again: Callable[[], Coroutine[Any, Any, ExecResult]]) -> None:
        """Interrupt an execution that nobody waits for until it has ended; its answer, asked for `again` under the same
        key, says which step it was."""
        ending = asyncio.ensure_future(again())
        pause = 0.05
        try:
            while not ending.done():
                with contextlib.suppress(SandboxError):
                    await self.interrupt()
                await asyncio.wait({ending}, timeout=pause)
                pause = min(2 * pause, 2.0)
            with contextlib.suppress(SandboxError, ValueError):  # then the next execution finds out
                self._done(await ending)
        finally:
            ending.cancel()

    async def _settled(self) -> None:
        if self._settling is not None:
            await asyncio.wait({self._settling})

    async def fork(self, count: int = 1, *, seeds: Sequence[int] | None = None) -> list[Session]:
        """As `Session.fork`, on the same server."""
        fields: dict[str, Any] = {"count": count, "idempotency_key": secrets.token_hex(16)}
        if (plain := check_copies(count, seeds)) is not None:
            fields["seeds"] = plain

        async def ask() -> list[Session]:
            rows = await self._at("POST", f"{self._path}/fork", _all_described, fields, _FORK_S)
            return [RemoteSession(self._box, self._endpoint, *row, self._wall_s) for row in rows]

        return await made(self._box, ask)

    async def snapshot(self) -> str:
        """As `Session.snapshot`."""
        return await self._post("snapshot", _snapshot)

    async def restore(self, snapshot: str) -> None:
        """As `Session.restore`."""
        check_id(snapshot)
        _, self.step = await self._post("restore", _described, {"snapshot": snapshot})

    async def interrupt(self) -> bool:
        """As `Session.interrupt`."""
        said = await self._box.at(self._endpoint, "POST", f"{self._path}/interrupt", Answer.fields)
        return bool(said.get("interrupted"))

    async def heartbeat(self) -> float:
        """As `Session.heartbeat`."""
        return await self._box.at(self._endpoint, "POST", f"{self._path}/heartbeat", _lease)

    def _file(self, path: str) -> str:
        return f"{self._path}/files/{quote(path.encode('utf-8', 'surrogateescape'), safe='/')}"

    async def write_file(self, path: str, data: bytes) -> None:
        """As `Session.write_file`."""
        check_file(path, data)
        await self._at("PUT", self._file(path), Answer.fields, bytes(data))

    async def read_file(self, path: str) -> bytes:
        """As `Session.read_file`."""
        check_path(path)
        return await self._at("GET", self._file(path), Answer.content)

    async def list_files(self) -> list[FileInfo]:
        """As `Session.list_files`."""
        return await self._at("GET", f"{self._path}/files", _files)

    async def close(self) -> None:
        """As `Session.close`. A session that is gone already is closed."""
        if self._closed:
            return
        self._closed = True
        self._endpoint.sessions -= 1
        if self._settling is not None:
            self._settling.cancel()
        try:
            await self._box.at(self._endpoint, "DELETE", self._path, Answer.fields)
        except SessionError as error:
            if error.code not in ("no_session", "session_ended"):
                raise
