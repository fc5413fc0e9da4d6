"""Session requests as they come over the wire: fields in, a reply out. Validated here, done in `sessions.py`."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from sandbox import paths
from sandbox.codec import result_fields
from sandbox.results import encode_error
from sandbox.supervisor.idempotency import IdempotencyStore, content
from sandbox.supervisor.sessions import Sessions, describe, lease
from sandbox.supervisor.sessions_live import Reply, Request
from sandbox.types import Limits, SandboxError, SandboxInfraError, SandboxProtocolError, SessionError
from sandbox.worker import channel

MAX_COPIES = 256
_FILE_ANSWER = paths.MAX_BYTES + 4096
_SIZE_MAX = 1 << 62


class SessionRequests:
    """`handles` says which operations are ours. Executions take the fast way (`execute`), the rest `answer`."""

    def __init__(self, sessions: Sessions, refusal: Callable[[Request], str]) -> None:
        self.sessions, self._refusal = sessions, refusal
        self._keys = IdempotencyStore()
        self._operations: dict[str, Callable[[dict[str, Any]], Awaitable[Reply]]] = {
            "session.open": self._open,
            "session.attach": self._attach,
            "session.heartbeat": self._heartbeat,
            "session.interrupt": self._interrupt,
            "session.close": self._close,
            "session.put": self._put,
            "session.get": self._get,
            "session.list": self._list,
            "session.fork": self._fork,
            "session.snapshot": self._snapshot,
            "session.restore": self._restore,
            "snapshot.restore": self._restore_new,
            "snapshot.drop": self._drop,
        }

    def handles(self, op: str) -> bool:
        """Whether `answer` knows this operation."""
        return op in self._operations

    def execute(self, message: dict[str, Any], reply: Callable[[Reply], None]) -> None:
        """`session.exec`: calls `reply` once, as soon as there is something to say."""
        try:
            ident = message["session"]
            limits = message.get("limits")
            session = self.sessions.find(ident)
            chosen = Limits(**limits) if limits else session.limits
            stdin, rich, owner = message.get("stdin", ""), bool(message.get("rich")), message.get("owner", "")
            request = Request(message["code"], stdin, chosen, rich, owner, message["id"])
            reason = self._refusal(request)
            if reason:
                reply({"result": result_fields(self.sessions.refuse(ident, request, reason))})
            else:
                session.execute(request, message.get("expect_step"), reply)
        except SandboxError as error:
            reply({"error": encode_error(error)})
        except (KeyError, TypeError, ValueError) as error:
            reply({"error": encode_error(SandboxProtocolError(f"bad request: {type(error).__name__}: {error}"))})

    async def answer(self, message: dict[str, Any]) -> Reply:
        """Every other operation."""
        try:
            return await self._operations[message["op"]](message)
        except SandboxError as error:
            return {"error": encode_error(error)}
        except OSError as error:  # out of descriptors, above all
            return {"error": encode_error(SandboxInfraError(f"the supervisor could not: {error}", "spawn_failed"))}
        except (KeyError, TypeError, ValueError) as error:
            return {"error": encode_error(SandboxProtocolError(f"bad request: {type(error).__name__}: {error}"))}

    async def _open(self, message: dict[str, Any]) -> Reply:
        key = message.get("key")
        if key is None:
            return await self._open_new(message)
        asked = content(message)
        earlier = self._keys.find(key, asked)
        if earlier is not None:
            return await asyncio.shield(earlier)
        self._keys.begin(key, asked)
        reply: Reply = {"error": encode_error(SandboxInfraError("the request was dropped", "shutdown"))}
        try:
            reply = await self._open_new(message)
        except SandboxError as error:
            reply = {"error": encode_error(error)}
        finally:
            self._keys.finish(key, reply, 512, keep="error" not in reply)
        return reply

    async def _open_new(self, message: dict[str, Any]) -> Reply:
        limits = Limits(**message["limits"])
        ttl = lease(message["ttl_s"])
        return describe(await self.sessions.open(limits, int(message["seed"]), ttl, message.get("profile") or ""))

    async def _attach(self, message: dict[str, Any]) -> Reply:
        session = self.sessions.find(message["session"])
        session.check()
        return describe(session)

    async def _heartbeat(self, message: dict[str, Any]) -> Reply:
        session = self.sessions.find(message["session"])
        session.check()
        return {"ttl_s": session.ttl_s}

    async def _interrupt(self, message: dict[str, Any]) -> Reply:
        session = self.sessions.find(message["session"])
        session.check()
        return {"interrupted": session.interrupt()}

    async def _close(self, message: dict[str, Any]) -> Reply:
        ending = self.sessions.close(message["session"])
        if ending is not None:
            await asyncio.shield(ending)
        return {}

    # --- files ----------------------------------------------------------------------------------------------------

    async def _put(self, message: dict[str, Any]) -> Reply:
        path = _path(message)
        try:
            data = base64.b64decode(message["data"], validate=True)
        except binascii.Error as error:
            raise SandboxProtocolError(f"bad request: data is not base64: {error}") from None
        if len(data) > paths.MAX_BYTES:
            raise SessionError(f"{len(data)} bytes; a file has at most {paths.MAX_BYTES}", "too_large")
        session = self.sessions.find(message["session"])
        if session.tree.unit.crowded(len(data)):
            raise SandboxInfraError("the disk that sessions write to is full", "disk_full")
        await self.sessions.command(session, channel.PUT, {"path": path}, data)
        return {}

    async def _get(self, message: dict[str, Any]) -> Reply:
        fields = {"path": _path(message), "cap": paths.MAX_BYTES}
        session = self.sessions.find(message["session"])
        _, body = await self.sessions.command(session, channel.GET, fields, b"", _FILE_ANSWER)
        return {"data": base64.b64encode(body).decode()}

    async def _list(self, message: dict[str, Any]) -> Reply:
        session = self.sessions.find(message["session"])
        answer, body = await self.sessions.command(session, channel.LIST, {}, b"", _FILE_ANSWER)
        sizes = answer.get("sizes")
        names = body.decode("utf-8", "surrogateescape").split("\0", paths.MAX_ENTRIES)
        good = [
            (path, size)
            for path, size in zip(names, sizes if isinstance(sizes, list) else ())
            if isinstance(size, int) and 0 <= size < _SIZE_MAX and not paths.refusal(path)
        ]
        return {"files": sorted(good)[: paths.MAX_ENTRIES]}

    # --- copies ---------------------------------------------------------------------------------------------------

    async def _fork(self, message: dict[str, Any]) -> Reply:
        session = self.sessions.find(message["session"])
        count, seeds = _count(message)
        return {"sessions": [describe(row) for row in await self.sessions.fork(session, count, seeds)]}

    async def _snapshot(self, message: dict[str, Any]) -> Reply:
        snapshot = await self.sessions.snapshot(self.sessions.find(message["session"]))
        return {"snapshot": snapshot.id}

    async def _restore(self, message: dict[str, Any]) -> Reply:
        session = self.sessions.find(message["session"])
        await self.sessions.restore(session, self.sessions.find_snapshot(message["snapshot"]))
        return describe(session)

    async def _restore_new(self, message: dict[str, Any]) -> Reply:
        count, seeds = _count(message)
        snapshot = self.sessions.find_snapshot(message["snapshot"])
        made = await self.sessions.restore_new(snapshot, count, seeds, lease(message.get("ttl_s", 600.0)))
        return {"sessions": [describe(row) for row in made]}

    async def _drop(self, message: dict[str, Any]) -> Reply:
        self.sessions.drop_snapshot(message["snapshot"])
        return {}


def _path(message: dict[str, Any]) -> str:
    path = message["path"]
    if not isinstance(path, str):
        raise SessionError("a path is text", "bad_path")
    if reason := paths.refusal(path):
        raise SessionError(reason, "bad_path")
    return path


def _count(message: dict[str, Any]) -> tuple[int, Sequence[int] | None]:
    count, seeds = message["count"], message.get("seeds")
    if not isinstance(count, int) or not 1 <= count <= MAX_COPIES:
        raise SandboxProtocolError(f"bad request: count must be 1 to {MAX_COPIES}, not {count!r}")
    if seeds is not None:
        if len(seeds) != count:
            raise SandboxProtocolError(f"bad request: {len(seeds)} seeds for {count} copies")
        seeds = [int(seed) for seed in seeds]
    return count, seeds
