"""`POST /v1/exec` and `POST /v1/batch`."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from sandbox.server.bodies import check, read_json, ticket
from sandbox.server.models import BatchRequest, ExecRequest, Key, Strict
from sandbox.server.protocol import Client
from sandbox.server.replies import Refused, Reply
from sandbox.server.state import ServerState

_BATCH_AHEAD = 2
"""Items of one batch under way at once, for each worker: enough to keep it busy, too few to crowd others out."""


class _KeyHeader(Strict):
    key: Key = Field(alias="Idempotency-Key")


def idempotency_key(request: Request, own: str | None) -> str | None:
    """From the body or the header `Idempotency-Key`. Raises `Refused` (422)."""
    if own is not None:
        return own
    for name, value in request.scope["headers"]:
        if name == b"idempotency-key":
            return check(_KeyHeader, {"Idempotency-Key": value.decode("latin-1")}).key
    return None


def fingerprint(*parts: object) -> str:
    """Names a request's content: a key that comes again with another one is refused."""
    return hashlib.sha256("\0".join(repr(part) for part in parts).encode("utf-8", "surrogatepass")).hexdigest()


async def while_connected(request: Request, work: Coroutine[Any, Any, Reply]) -> Reply | None:
    """`work`'s answer; it is cancelled, and the answer None, when the client goes away first."""
    task = asyncio.current_task()
    client = request.scope["retool.client"]
    assert task is not None and isinstance(client, Client)
    if client.gone:
        work.close()
        return None

    def leave() -> None:
        task.cancel()

    client.watchers.add(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if not client.gone:
            raise
        task.uncancel()
        return None
    finally:
        client.watchers.discard(leave)


async def once_or_watched(
    state: ServerState,
    request: Request,
    name: tuple[str, str | None],
    mark: str,
    work: Callable[[], Coroutine[Any, Any, Reply]],
) -> Response:
    """Run `work`: exactly once when it has a key (`name` is operation and key), else while the client stays."""
    operation, key = name
    if key is not None:
        return (await state.once.run((ticket(request).owner, operation, key), mark, work)).response()
    reply = await while_connected(request, work())
    return reply.response() if reply is not None else Response(status_code=499)


async def exec_one(state: ServerState, request: Request) -> Response:
    """One execution."""
    data = await read_json(request)
    item = check(ExecRequest, data)
    key = idempotency_key(request, item.idempotency_key)
    state.check_profile(item.profile)
    state.limits(item.limits)
    mark = fingerprint(*item.model_copy(update={"idempotency_key": None, "deadline_ms": None})) if key else ""
    owner = ticket(request).owner

    async def work() -> Reply:
        state.load.check(owner)
        return await state.answer(item, owner=owner)

    return await once_or_watched(state, request, ("exec", key), mark, work)


async def _item(state: ServerState, owner: str, index: int, data: Any, arrived: float) -> bytes:
    """One line of a batch's answer."""
    try:
        item = check(ExecRequest, data)
        state.check_profile(item.profile)
        state.limits(item.limits)
        work = functools.partial(state.answer, item, arrived, owner)
        if item.idempotency_key is None:
            reply = await work()
        else:
            mark = fingerprint(*item.model_copy(update={"idempotency_key": None, "deadline_ms": None}))
            reply = await state.once.run((owner, "exec", item.idempotency_key), mark, work)
    except Refused as refused:
        reply = refused.reply()
    head = b'{"index":%d,"http_status":%d,' % (index, reply.status)
    if reply.status in (200, 422) and reply.body.startswith(b'{"status"'):
        return head + b'"result":' + reply.body + b"}\n"
    return head + reply.body[1:] + b"\n"


async def _lines(state: ServerState, owner: str, items: list[Any], arrived: float) -> AsyncIterator[bytes]:
    """Lines in the order in which items finish. Closing the iterator cancels what has no key and still runs."""
    pending: set[asyncio.Task[bytes]] = set()
    remaining = enumerate(items)
    later = len(items)
    state.load.later(owner, later)
    try:
        while True:
            while len(pending) < _BATCH_AHEAD * state.workers and (entry := next(remaining, None)) is not None:
                pending.add(asyncio.ensure_future(_item(state, owner, *entry, arrived)))
                state.load.later(owner, -1)
                later -= 1
            if not pending:
                return
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            yield b"".join(task.result() for task in done)
    finally:
        state.load.later(owner, -later)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


async def exec_batch(state: ServerState, request: Request) -> Response:
    """Many executions, one JSON object a line as each finishes."""
    arrived = time.monotonic()
    batch = check(BatchRequest, await read_json(request))
    owner = ticket(request).owner
    state.load.check(owner)
    lines = _lines(state, owner, batch.items, arrived)
    return StreamingResponse(lines, media_type="application/x-ndjson")
