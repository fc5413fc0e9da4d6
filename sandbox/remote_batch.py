"""Many executions asked for at once share one request: a training step of thousands needs no thousands of sockets.

Off while few are under way: a single execution never waits for company.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

from sandbox.codec import dumps, parse_result
from sandbox.remote_endpoint import MAX_ANSWER, Answer, Endpoint, LostRequest
from sandbox.types import ExecResult, SandboxError, SandboxProtocolError

WINDOW_S = 0.003
"""Longest wait for company."""
MAX_ITEMS = 64
MAX_ITEM_BYTES = 128 * 1024
"""A larger request goes alone."""
_LINES = "application/x-ndjson"


@dataclass(eq=False)
class _Item:
    fields: dict[str, Any]
    seconds: float
    future: asyncio.Future[ExecResult]
    server: Endpoint | None = None


class Coalescer:
    """`await send(fields, seconds)`: the result of one execution, sent together with others."""

    def __init__(self, pick: Callable[[float], Awaitable[Endpoint]]) -> None:
        self._pick = pick
        self._groups: dict[int, list[_Item]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.batches = 0

    async def send(self, fields: dict[str, Any], seconds: float) -> ExecResult:
        """Raises what sending the batch raised, what its own line says, and `LostRequest` after `seconds`, however long
        the others may take."""
        loop = asyncio.get_running_loop()
        item = _Item(fields, seconds, loop.create_future())
        # Who has much more time keeps other company: a server works through a batch in order.
        time_class = math.frexp(seconds)[1]
        group = self._groups.setdefault(time_class, [])
        group.append(item)
        if len(group) >= MAX_ITEMS:
            self._begin(self._groups.pop(time_class))
        elif self._timer is None:
            self._timer = loop.call_later(WINDOW_S, self._flush)
        try:
            async with asyncio.timeout(seconds):
                return await item.future
        except TimeoutError:
            where = item.server.url if item.server is not None else "a batch"
            message = f"{where}: no answer within {seconds:.1f} s"
            raise LostRequest(message, sent=True, late=True, server=item.server) from None

    def _flush(self) -> None:
        self._timer = None
        groups, self._groups = self._groups, {}
        for group in groups.values():
            self._begin(group)

    def _begin(self, group: list[_Item]) -> None:
        items = [item for item in group if not item.future.done()]
        if items:
            task = asyncio.ensure_future(self._run(items))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self, items: list[_Item]) -> None:
        try:
            await self._exchange(items)
        except (SandboxError, ValueError) as error:
            _settle(items, error)
        except asyncio.CancelledError:
            _settle(items, LostRequest("the client was closed", sent=True))
            raise
        except Exception as error:  # a mistake of ours must not leave callers waiting for ever
            _settle(items, SandboxProtocolError(f"the batch failed: {error!r:.200}"))

    async def _exchange(self, items: list[_Item]) -> None:
        seconds = max(item.seconds for item in items)
        endpoint = await self._pick(seconds)
        self.batches += 1
        for item in items:
            item.server = endpoint
        body = dumps({"items": [item.fields for item in items]})
        headers = {"Content-Type": "application/json"}
        async with endpoint.stream("POST", "/v1/batch", body, seconds=seconds, headers=headers) as response:
            if response.status != 200 or not response.headers.get("content-type", "").startswith(_LINES):
                endpoint.take(await endpoint.read(response), _no_batch)
            try:
                async for line in _lines(response):
                    index, answer = _parse(line, len(items))
                    _answer(items[index].future, endpoint, answer)
            except SandboxProtocolError as strange:
                raise endpoint.nonsense(str(strange)) from None
        if not all(item.future.done() for item in items):
            _settle(items, endpoint.lost("ended a batch early", sent=True))

    async def close(self) -> None:
        """Give up what is under way."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def exec_result(answer: Answer) -> ExecResult:
    """The result of one execution. Raises `SandboxProtocolError`."""
    return parse_result(answer.fields())


def _no_batch(answer: Answer) -> None:
    raise SandboxProtocolError(f"the server answered a batch with {answer.kind or 'nothing'}")


def _answer(future: asyncio.Future[ExecResult], endpoint: Endpoint, answer: Answer) -> None:
    if future.done():
        return
    try:
        future.set_result(endpoint.take(answer, exec_result))
    except (SandboxError, ValueError) as error:
        future.set_exception(error)


def _settle(items: list[_Item], error: Exception) -> None:
    for item in items:
        if not item.future.done():
            item.future.set_exception(error)


def _parse(line: bytes, count: int) -> tuple[int, Answer]:
    try:
        fields = json.loads(line)
        index, status = int(fields["index"]), int(fields["http_status"])
        body = fields["result"] if "result" in fields else {"error": fields["error"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SandboxProtocolError(f"the server sent a malformed line: {error!r:.100}") from None
    if not 0 <= index < count:
        raise SandboxProtocolError(f"the server sent a result number {index} of {count}")
    return index, Answer(status, b"", parsed=body)


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Whole lines; each, and the rest that waits for its end, is bounded. A last line without an end is dropped."""
    rest: list[bytes] = []
    held = 0
    async for chunk in response.content.iter_any():
        *ends, last = chunk.split(b"\n")
        for end in ends:
            yield b"".join([*rest, end])
            rest, held = [], 0
        rest.append(last)
        held += len(last)
        if held > MAX_ANSWER:
            raise SandboxProtocolError(f"a line of more than {MAX_ANSWER} bytes")
