"""A handle of a session in the embedded supervisor."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self, cast

from sandbox.arguments import check_copies, check_file, check_id, check_path, check_program, check_step
from sandbox.link import Link
from sandbox.results import decode_result
from sandbox.types import ExecResult, FileInfo, Limits, SandboxError, SandboxUnavailable, Session, SessionError

_closing: set[asyncio.Task[None]] = set()


async def made(link: Link, message: dict[str, Any]) -> list[LocalSession]:
    """The new sessions that a request brings. Those that nobody waits for any more when they come are closed."""
    asking = asyncio.ensure_future(link.ask(message))
    try:
        return _handles(link, await asyncio.shield(asking))
    except asyncio.CancelledError:
        task = asyncio.ensure_future(_close(link, asking))
        _closing.add(task)
        task.add_done_callback(_closing.discard)
        raise


def _handles(link: Link, reply: dict[str, Any]) -> list[LocalSession]:
    return [LocalSession(link, row) for row in reply.get("sessions", (reply,))]


async def _close(link: Link, asking: asyncio.Future[dict[str, Any]]) -> None:
    with contextlib.suppress(SandboxError):  # then there is none
        for session in _handles(link, await asking):
            await session.close()


class LocalSession:
    """See `Session`. A handle may be used by several tasks; two executions at once are `busy`. A cancelled `exec` is
    interrupted, unless `expect_step` says that somebody may come back for it; later calls wait until it has ended.

    It belongs to one supervisor: when that dies, calls under way raise `SandboxUnavailable` and later ones
    `SessionError(session_ended)`.
    """

    def __init__(self, link: Link, opened: dict[str, Any]) -> None:
        self._link = link
        self.id: str = opened["session"]
        self.ttl_s: float = opened["ttl_s"]
        """Seconds that the lease lasts from each call."""
        self._cancelled: asyncio.Future[dict[str, Any]] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    def _check(self) -> None:
        if self._link.dead:
            raise SessionError("the session has ended: the supervisor that held it has gone", "session_ended")

    def _left(self, late: asyncio.Future[dict[str, Any]]) -> None:
        self._cancelled = late

    async def _settled(self) -> None:
        """The execution that was cancelled, if one was, has ended."""
        while (late := self._cancelled) is not None:
            await asyncio.wait({late})
            if self._cancelled is late:
                self._cancelled = None
        self._check()

    async def _ask(self, op: str, **fields: Any) -> dict[str, Any]:
        self._check()
        return await self._link.ask({"op": op, "session": self.id, **fields})

    async def _after(self, op: str, **fields: Any) -> dict[str, Any]:
        await self._settled()
        return await self._ask(op, **fields)

    async def exec(
        self,
        code: str,
        *,
        stdin: str = "",
        limits: Limits | None = None,
        expect_step: int | None = None,
        rich: bool = False,
    ) -> ExecResult:
        """See `Session.exec`."""
        check_program(code, stdin, limits)
        check_step(expect_step)
        fields = await self.exec_fields(code, stdin=stdin, limits=limits, expect_step=expect_step, rich=rich)
        return decode_result(fields)

    async def exec_fields(
        self, code: str, *, stdin: str, limits: Limits | None, expect_step: int | None, rich: bool, owner: str = ""
    ) -> dict[str, Any]:
        """`exec` for a server, which has checked the arguments: the result as JSON fields (`codec.result_fields`), as
        the supervisor wrote them. `owner`: callers with different ones take turns in the queue."""
        message: dict[str, Any] = {"op": "session.exec", "session": self.id, "code": code}
        if stdin:
            message["stdin"] = stdin
        if limits is not None:
            message["limits"] = asdict(limits)
        if expect_step is not None:
            message["expect_step"] = expect_step
        if rich:
            message["rich"] = True
        if owner:
            message["owner"] = owner
        await self._settled()
        cancel = {"op": "session.cancel", "session": self.id} if expect_step is None else None
        return cast("dict[str, Any]", (await self._link.ask(message, cancel, self._left))["result"])

    async def fork(self, count: int = 1, *, seeds: Sequence[int] | None = None) -> list[Session]:
        """See `Session.fork`."""
        plain = check_copies(count, seeds)
        await self._settled()
        message = {"op": "session.fork", "session": self.id, "count": count, "seeds": plain}
        return list(await made(self._link, message))

    async def snapshot(self) -> str:
        """See `Session.snapshot`."""
        return str((await self._after("session.snapshot"))["snapshot"])

    async def restore(self, snapshot: str) -> None:
        """See `Session.restore`."""
        check_id(snapshot)
        await self._after("session.restore", snapshot=snapshot)

    async def interrupt(self) -> bool:
        """See `Session.interrupt`."""
        return bool((await self._ask("session.interrupt"))["interrupted"])

    async def write_file(self, path: str, data: bytes) -> None:
        """See `Session.write_file`."""
        check_file(path, data)
        await self._after("session.put", path=path, data=base64.b64encode(data).decode())

    async def read_file(self, path: str) -> bytes:
        """See `Session.read_file`."""
        check_path(path)
        return base64.b64decode((await self._after("session.get", path=path))["data"])

    async def list_files(self) -> list[FileInfo]:
        """See `Session.list_files`."""
        return [FileInfo(path, size) for path, size in (await self._after("session.list"))["files"]]

    async def heartbeat(self) -> float:
        """See `Session.heartbeat`."""
        return float((await self._ask("session.heartbeat"))["ttl_s"])

    async def close(self) -> None:
        """See `Session.close`."""
        if not self._link.dead:
            with contextlib.suppress(SandboxUnavailable):  # then it has ended, too
                await self._ask("session.close")
