"""A session on a server. Calls that change it carry a key, executions their step: a retry after a lost answer takes
effect exactly once."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from sandbox.codec import dumps, parse_files
from sandbox.remote_batch import exec_result
from sandbox.remote_endpoint import Answer, Endpoint, LostRequest, Parse, Value
from sandbox.types import (
    ExecResult,
    FileInfo,
    Limits,
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


async def open_session(box: RemoteSandbox, fields: dict[str, Any]) -> RemoteSession:
    """A new session on the server with the fewest of ours; on another when that one fails or has no room."""
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
        except LostRequest as lost:
            if lost.sent and not lost.late:  # a session may have been opened there: the key finds it
                prefer, shun = endpoint, None
            raise
        except SessionError as error:
            if error.code != "too_many" or len(full) + 1 >= len(box.endpoints):
                raise
            full.add(endpoint)
            raise SandboxUnavailable(f"{endpoint.url}: {error}") from error

    endpoint, described = await box.persist(attempt, box.total_s)
    wall_s = float(fields.get("limits", {}).get("wall_s", box.default_wall_s))
    return RemoteSession(box, endpoint, *described, wall_s)


async def restore_sessions(box: RemoteSandbox, snapshot: str, count: int, seeds: Sequence[int] | None) -> list[Session]:
    """New sessions, where the snapshot is."""
    fields: dict[str, Any] = {"count": count, "idempotency_key": secrets.token_hex(16)}
    if seeds is not None:
        fields["seeds"] = list(seeds)
    path = f"/v1/snapshots/{quote(snapshot, safe='')}/restore"
    endpoint, rows = await box.everywhere("POST", path, "no_snapshot", _all_described, fields, seconds=60.0)
    return [RemoteSession(box, endpoint, *row, box.default_wall_s) for row in rows]


class RemoteSession:
    """A handle of a session. It counts steps for itself: let one handle write, or pass `expect_step`."""

    def __init__(self, box: RemoteSandbox, endpoint: Endpoint, ident: str, step: int, wall_s: float) -> None:
        self.id = ident
        self.step = step
        self._box, self._endpoint, self._wall_s = box, endpoint, wall_s
        self._path = f"/v1/sessions/{quote(ident, safe='')}"
        self._executing = False
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

    async def _post(
        self, what: str, parse: Parse[Value], fields: dict[str, Any] | None = None, seconds: float = 60.0
    ) -> Value:
        body = {**(fields or {}), "idempotency_key": secrets.token_hex(16)}
        return await self._box.at(self._endpoint, "POST", f"{self._path}/{what}", parse, body, seconds=seconds)

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
        if self._executing and expect_step is None:
            raise SessionError("an execution is under way in this session", "busy")
        fields: dict[str, Any] = {"code": code, "expect_step": self.step + 1 if expect_step is None else expect_step}
        optional = {"stdin": stdin, "limits": asdict(limits) if limits is not None else None, "rich": rich}
        fields |= {name: value for name, value in optional.items() if value}
        wall_s = limits.wall_s if limits is not None else self._wall_s
        self._executing = True
        try:
            result = await self._post("exec", exec_result, fields, wall_s + 40.0)
        finally:
            self._executing = False
        self.step = max(self.step, result.step)
        return result

    async def fork(self, count: int = 1, *, seeds: Sequence[int] | None = None) -> list[Session]:
        """As `Session.fork`, on the same server."""
        fields: dict[str, Any] = {"count": count}
        if seeds is not None:
            fields["seeds"] = list(seeds)
        rows = await self._post("fork", _all_described, fields, _FORK_S)
        return [RemoteSession(self._box, self._endpoint, *row, self._wall_s) for row in rows]

    async def snapshot(self) -> str:
        """As `Session.snapshot`."""
        return await self._post("snapshot", _snapshot)

    async def restore(self, snapshot: str) -> None:
        """As `Session.restore`."""
        _, self.step = await self._post("restore", _described, {"snapshot": snapshot})

    async def interrupt(self) -> bool:
        """As `Session.interrupt`."""
        said = await self._box.at(self._endpoint, "POST", f"{self._path}/interrupt", Answer.fields)
        return bool(said.get("interrupted"))

    async def heartbeat(self) -> float:
        """As `Session.heartbeat`."""
        return await self._box.at(self._endpoint, "POST", f"{self._path}/heartbeat", _lease)

    def _file(self, path: str) -> str:
        parts = [quote(part.encode("utf-8", "surrogateescape"), safe="") for part in path.split("/")]
        # A path of dots would be resolved on the way; the server is to see it, and to refuse it.
        return f"{self._path}/files/" + "/".join(p.replace(".", "%2E") if p in (".", "..") else p for p in parts)

    async def write_file(self, path: str, data: bytes) -> None:
        """As `Session.write_file`."""
        await self._box.at(self._endpoint, "PUT", self._file(path), Answer.fields, data)

    async def read_file(self, path: str) -> bytes:
        """As `Session.read_file`."""
        return await self._box.at(self._endpoint, "GET", self._file(path), Answer.content)

    async def list_files(self) -> list[FileInfo]:
        """As `Session.list_files`."""
        return await self._box.at(self._endpoint, "GET", f"{self._path}/files", _files)

    async def close(self) -> None:
        """As `Session.close`. A session that is gone already is closed."""
        if self._closed:
            return
        self._closed = True
        self._endpoint.sessions -= 1
        try:
            await self._box.at(self._endpoint, "DELETE", self._path, Answer.fields)
        except SessionError as error:
            if error.code not in ("no_session", "session_ended"):
                raise
