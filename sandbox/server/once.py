"""Exactly once: a request with an idempotency key runs on when its client goes away, and a retry gets its answer."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

from sandbox.server.replies import Refused, Reply

KEEP_S = 600.0
KEEP_BYTES = 64 * 1024 * 1024
KEY_CHARACTERS = 256
_PACKED = range(1024, 128 * 1024)
"""Sizes of bodies that are kept compressed: below it gains little, above it would take more than 2 ms."""


@dataclass(slots=True)
class _Entry:
    """Thousands are kept: once it is done, the answer alone."""

    fingerprint: str
    task: asyncio.Task[Reply] | None
    reply: Reply | None = None
    packed: bool = False
    born: float = 0.0  # begun, or finished
    size: int = 0

    def keep(self, reply: Reply) -> None:
        """It is done."""
        packed = len(reply.body) in _PACKED
        self.reply = replace(reply, body=zlib.compress(reply.body, 1)) if packed else reply
        self.task, self.packed = None, packed
        self.born, self.size = time.monotonic(), len(self.reply.body) + 512

    def answer(self) -> Reply:
        """What was kept."""
        assert self.reply is not None
        return replace(self.reply, body=zlib.decompress(self.reply.body)) if self.packed else self.reply


class Once:
    """Answers by (owner, operation, key). Kept `KEEP_S` seconds and `KEEP_BYTES` bytes in all, oldest out first.

    Only work that took effect is remembered: after a failure of ours a retry really runs.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[str, str, str], _Entry] = OrderedDict()
        self._bytes = 0
        self._keyed = 0
        self.hits = 0

    async def run(
        self, key: tuple[str, str, str], fingerprint: str, work: Callable[[], Coroutine[Any, Any, Reply]]
    ) -> Reply:
        """The answer to `key`, from the work under way or done when there is one. Cancelling the caller leaves the work
        running. Raises `Refused` (409) when the key was used for something else."""
        self._expire()
        entry = self._entries.get(key)
        if entry is None:
            task = asyncio.ensure_future(work())
            entry = self._entries[key] = _Entry(fingerprint, task, born=time.monotonic())
            self._keyed += 1
            task.add_done_callback(lambda task: self._finished(key, task))
        elif entry.fingerprint != fingerprint:
            raise Refused(
                409, "idempotency_conflict", f"the idempotency key {key[2]!r} was used for a different request"
            )
        else:
            self.hits += 1
        if entry.task is not None:
            return await asyncio.shield(entry.task)
        return entry.answer()

    @property
    def running(self) -> int:
        """Work under way, whether or not anybody waits for it."""
        return self._keyed

    def _finished(self, key: tuple[str, str, str], task: asyncio.Task[Reply]) -> None:
        self._keyed -= 1
        if task.cancelled() or task.exception() is not None or not task.result().done:
            del self._entries[key]
            return
        entry = self._entries.pop(key)
        entry.keep(task.result())
        self._entries[key] = entry  # order: by when it was finished
        self._bytes += entry.size

    def _expire(self) -> None:
        now = time.monotonic()
        for key, entry in list(self._entries.items()) if self._crowded(now) else ():
            if entry.task is not None:
                continue
            if now - entry.born < KEEP_S and self._bytes <= KEEP_BYTES:
                break
            del self._entries[key]
            self._bytes -= entry.size

    def _crowded(self, now: float) -> bool:
        if self._bytes > KEEP_BYTES:
            return True
        oldest = next(iter(self._entries.values()), None)
        return oldest is not None and now - oldest.born >= KEEP_S
