"""Who may run now: a bounded number of slots, and a queue that is fair between callers and honest about waiting.

A caller that cannot be served in time is told so at once (`SandboxOverloaded` with `retry_after`), not after a timeout.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque

from sandbox.types import SandboxOverloaded

_SMOOTHING = 0.05  # weight of the newest execution in the mean time that one takes
_RETRY_MIN_S, _RETRY_MAX_S = 0.05, 30.0


class _Waiter:
    __slots__ = ("admitted", "since")

    def __init__(self) -> None:
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.since = time.monotonic()


class Admission:
    """`slots` executions at once; `queue` may wait. Owners take turns, each owner's requests go in order."""

    def __init__(self, slots: int, queue: int) -> None:
        self.slots, self.queue = slots, queue
        self.free = slots
        self.waiting = 0
        self.mean_s = 0.01
        self._owners: OrderedDict[str, deque[_Waiter]] = OrderedDict()

    def expected_wait(self, owner: str = "") -> float:
        """Seconds that a request of `owner` would wait now, as far as can be told."""
        if self.free > 0 and self.waiting == 0:
            return 0.0
        turn = len(self._owners.get(owner, ())) + 1
        ahead = sum(min(len(line), turn) for line in self._owners.values())
        return (ahead + 1) * self.mean_s / self.slots

    def try_acquire(self) -> bool:
        """Take a slot if one is free and nobody waits."""
        if self.free > 0 and self.waiting == 0:
            self.free -= 1
            return True
        return False

    def _overloaded(self, message: str, wait: float) -> SandboxOverloaded:
        return SandboxOverloaded(message, min(_RETRY_MAX_S, max(_RETRY_MIN_S, wait)))

    async def acquire(self, owner: str = "", deadline_s: float | None = None) -> None:
        """Wait for a slot. Raises `SandboxOverloaded`: the queue is full, or `deadline_s` cannot be or was not met."""
        if self.try_acquire():
            return
        wait = self.expected_wait(owner)
        if self.waiting >= self.queue:
            raise self._overloaded(f"{self.waiting} executions wait already", wait)
        if deadline_s is not None and wait > deadline_s:
            raise self._overloaded(f"the wait would be about {wait:.2f} s, the deadline is {deadline_s:.2f} s", wait)
        waiter = _Waiter()
        self._owners.setdefault(owner, deque()).append(waiter)
        self.waiting += 1
        try:
            async with asyncio.timeout(deadline_s):
                await waiter.admitted
        except BaseException as error:
            if waiter.admitted.done() and not waiter.admitted.cancelled():
                self.release()  # admitted in the same moment: hand the slot on
            else:
                self._forget(owner, waiter)
            if isinstance(error, TimeoutError):
                raise self._overloaded(f"not started within {deadline_s} s", self.expected_wait(owner)) from None
            raise

    def _forget(self, owner: str, waiter: _Waiter) -> None:
        line = self._owners.get(owner)
        if line is not None and waiter in line:
            line.remove(waiter)
            self.waiting -= 1
            if not line:
                del self._owners[owner]

    def release(self) -> None:
        """Give a slot back: the next owner in turn gets it."""
        while self._owners:
            owner, line = self._owners.popitem(last=False)
            waiter = line.popleft()
            self.waiting -= 1
            if line:
                self._owners[owner] = line  # to the end: the others come first now
            if not waiter.admitted.done():
                waiter.admitted.set_result(None)
                return
        self.free += 1

    def took(self, seconds: float) -> None:
        """Learn how long an execution held its slot."""
        self.mean_s += _SMOOTHING * (seconds - self.mean_s)
