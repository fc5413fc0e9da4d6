"""A session on a server. Calls that change it carry a key, executions their step: a retry after a lost answer takes
effect exactly once."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from sandbox.codec import dumps, parse_files, parse_result
from sandbox.remote_endpoint import Answer, Endpoint
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


def _sessions(box: RemoteSandbox, endpoint: Endpoint, answer: Answer, wall_s: float) -> list[Session]:
    try:
        return [
            RemoteSession(box, endpoint, str(item["id"]), int(item["step"]), wall_s)
            for item in answer.fields()["sessions"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise SandboxProtocolError(f"the server sent malformed sessions: {error!r:.200}") from None


def _described(answer: Answer) -> tuple[str, int]:
    fields = answer.fields()
    try:
        return str(fields["id"]), int(fields["step"])
    except (KeyError, TypeError, ValueError) as error:
        raise SandboxProtocolError(f"the server sent a malformed session: {error!r:.200}") from None


async def open_session(box: RemoteSandbox, fields: dict[str, Any]) -> RemoteSession:
    """A new session on the server with the fewest of ours; on another when that one fails or has no room."""
    prefer: Endpoint | None = None
    full: set[Endpoint] = set()
    body = dumps(fields)

    async def attempt(left: float) -> Answer:
        nonlocal prefer
        endpoint = await box.pick(left, prefer, full, sticky=True)
        prefer = endpoint  # a session may have been opened although the answer was lost: there, the key finds it
        answer = await endpoint.send("POST", "/v1/sessions", body, seconds=min(left, 60.0), headers=_JSON)
        error = answer.error()
        if isinstance(error, SessionError) and error.code == "too_many" and len(full) + 1 < len(box.endpoints):
            full.add(endpoint)
            prefer = None
            raise SandboxUnavailable(f"{endpoint.url}: {error}")
        return answer

    answer = await box.persist(attempt, box.total_s)
    assert prefer is not None
    ident, step = _described(answer)
    wall_s = float(fields.get("limits", {}).get("wall_s", box.default_wall_s))
    return RemoteSession(box, prefer, ident, step, wall_s)


async def restore_sessions(box: RemoteSandbox, snapshot: str, count: int, seeds: Sequence[int] | None) -> list[Session]:
    """New sessions, where the snapshot is."""
    fields: dict[str, Any] = {"count": count, "idempotency_key": secrets.token_hex(16)}
    if seeds is not None:
        fields["seeds"] = list(seeds)
    path = f"/v1/snapshots/{quote(snapshot, safe='')}/restore"
    endpoint, answer = await box.everywhere("POST", path, "no_snapshot", fields)
    return _sessions(box, endpoint, answer, box.default_wall_s)


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
        endpoint, answer = await box.everywhere("GET", path, "no_session")
        return cls(box, endpoint, *_described(answer), box.default_wall_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def _post(self, what: str, fields: dict[str, Any] | None = None, seconds: float = 60.0) -> Answer:
        body = {**(fields or {}), "idempotency_key": secrets.token_hex(16)}
        return await self._box.at(self._endpoint, "POST", f"{self._path}/{what}", body, seconds=seconds)

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
            answer = await self._post("exec", fields, wall_s + 40.0)
        finally:
            self._executing = False
        result = parse_result(answer.fields())
        self.step = max(self.step, result.step)
        return result

    async def fork(self, count: int = 1, *, seeds: Sequence[int] | None = None) -> list[Session]:
        """As `Session.fork`, on the same server."""
        fields: dict[str, Any] = {"count": count}
        if seeds is not None:
            fields["seeds"] = list(seeds)
        return _sessions(self._box, self._endpoint, await self._post("fork", fields, _FORK_S), self._wall_s)

    async def snapshot(self) -> str:
        """As `Session.snapshot`."""
        fields = (await self._post("snapshot")).fields()
        if not isinstance(fields.get("snapshot"), str):
            raise SandboxProtocolError("the server sent no snapshot id")
        return str(fields["snapshot"])

    async def restore(self, snapshot: str) -> None:
        """As `Session.restore`."""
        self.step = _described(await self._post("restore", {"snapshot": snapshot}))[1]

    async def interrupt(self) -> bool:
        """As `Session.interrupt`."""
        answer = await self._box.at(self._endpoint, "POST", f"{self._path}/interrupt")
        return bool(answer.fields().get("interrupted"))

    async def heartbeat(self) -> float:
        """As `Session.heartbeat`."""
        answer = await self._box.at(self._endpoint, "POST", f"{self._path}/heartbeat")
        try:
            return float(answer.fields()["lease_s"])
        except (KeyError, TypeError, ValueError):
            raise SandboxProtocolError("the server sent no lease") from None

    def _file(self, path: str) -> str:
        parts = [quote(part.encode("utf-8", "surrogateescape"), safe="") for part in path.split("/")]
        # A path of dots would be resolved on the way; the server is to see it, and to refuse it.
        return f"{self._path}/files/" + "/".join(p.replace(".", "%2E") if p in (".", "..") else p for p in parts)

    async def write_file(self, path: str, data: bytes) -> None:
        """As `Session.write_file`."""
        await self._box.at(self._endpoint, "PUT", self._file(path), data)

    async def read_file(self, path: str) -> bytes:
        """As `Session.read_file`."""
        return (await self._box.at(self._endpoint, "GET", self._file(path))).body

    async def list_files(self) -> list[FileInfo]:
        """As `Session.list_files`."""
        return parse_files((await self._box.at(self._endpoint, "GET", f"{self._path}/files")).fields())

    async def close(self) -> None:
        """As `Session.close`. A session that is gone already is closed."""
        if self._closed:
            return
        self._closed = True
        self._endpoint.sessions -= 1
        try:
            await self._box.at(self._endpoint, "DELETE", self._path)
        except SessionError as error:
            if error.code not in ("no_session", "session_ended"):
                raise
