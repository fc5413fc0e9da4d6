"""A retry attaches to the running job or gets the stored result; it never runs twice."""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from sandbox.types import SandboxInfraError

KEEP_S = 600.0
KEEP_BYTES = 64 * 1024 * 1024

Reply = dict[str, Any]
_OTHERWISE = ("id", "key", "owner", "deadline_s")
"""What of a request may be another in a retry."""


def content(request: Mapping[str, Any]) -> int:
    """What a request asks for, as a number."""
    return hash(json.dumps({name: value for name, value in request.items() if name not in _OTHERWISE}, sort_keys=True))


class IdempotencyStore:
    """Key -> future of a reply. Finished replies are kept `KEEP_S` seconds and `KEEP_BYTES` bytes, oldest out first."""

    def __init__(self) -> None:
        self._entries: OrderedDict[str, tuple[int, float, int, asyncio.Future[Reply]]] = OrderedDict()
        self._bytes = 0

    def find(self, key: str, asked: int) -> asyncio.Future[Reply] | None:
        """The reply, or its future, of an earlier request with this key. Raises `SandboxInfraError`
        (idempotency_conflict) when that had another `content` than `asked`."""
        self._expire()
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry[0] != asked:
            message = f"the idempotency key {key!r:.200} was used for a different request"
            raise SandboxInfraError(message, "idempotency_conflict", retryable=False)
        return entry[3]

    def begin(self, key: str, asked: int) -> asyncio.Future[Reply]:
        """Remember that `key` is running."""
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._entries[key] = (asked, time.monotonic(), 0, future)
        return future

    def finish(self, key: str, reply: Reply, size: int, *, keep: bool) -> None:
        """Hand the reply to everybody who waits; failures of ours are not kept, so that a retry really runs."""
        asked, _, _, future = self._entries.pop(key)
        if not future.done():
            future.set_result(reply)
        if keep:
            self._entries[key] = (asked, time.monotonic(), size, future)
            self._bytes += size
            self._expire()

    def _expire(self) -> None:
        now = time.monotonic()
        for key in list(self._entries):
            _, born, size, future = self._entries[key]
            if not future.done():
                continue
            if now - born < KEEP_S and self._bytes <= KEEP_BYTES:
                break
            del self._entries[key]
            self._bytes -= size
