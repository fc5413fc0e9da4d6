"""How full the server is, and who fills it: executions and request bytes, by owner, so that nobody's work crowds out
another's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from sandbox.server.replies import overloaded

MAX_HELD_BYTES = 512 * 1024 * 1024
"""Request bytes in memory at once; more is refused with 429. One owner may have half of it."""
_OWNERS = 8
"""All owners together may have so many times as much as one."""
_SMOOTHING = 0.05  # weight of the newest execution in the mean time that one takes


class _Share:
    """What is one owner's: executions given to the sandbox, those of batches that are not yet, bytes of requests."""

    __slots__ = ("begun", "bytes", "later")

    def __init__(self) -> None:
        self.begun = self.later = self.bytes = 0


class Load:
    """Executions under way or admitted, whether or not anybody waits for their answers. `queue`: how many of one owner
    may wait beyond `workers`."""

    def __init__(self, workers: int, queue: int) -> None:
        self.workers, self.most = workers, workers + queue
        self.total = self.held_bytes = 0
        self._begun = 0
        self._mean_s = 0.01
        self._shares: dict[str, _Share] = {}

    def _share(self, owner: str) -> _Share:
        share = self._shares.get(owner)
        if share is None:
            share = self._shares[owner] = _Share()
        return share

    def expected_wait(self, owner: str) -> float:
        """Seconds that another execution of `owner` would wait, as far as can be told: owners take turns."""
        if self._begun < self.workers:
            return 0.0
        turn = self._share(owner).begun + 1
        ahead = sum(min(share.begun, turn) for share in self._shares.values())
        return (max(0, ahead - self.workers) + 1) * self._mean_s / self.workers

    def check(self, owner: str) -> None:
        """Raises `Refused` (429) when another execution of `owner` has no place."""
        share = self._share(owner)
        mine = share.begun + share.later
        if mine >= self.most:
            raise overloaded(f"{mine} executions of yours are under way or wait already", self.expected_wait(owner))
        if self.total >= _OWNERS * self.most:
            raise overloaded(f"{self.total} executions are under way or wait already", self.expected_wait(owner))

    def enter(self, owner: str) -> None:
        """Another one is given to the sandbox."""
        self._share(owner).begun += 1
        self._begun += 1
        self.total += 1

    def leave(self, owner: str) -> None:
        """It has ended."""
        self._share(owner).begun -= 1
        self._begun -= 1
        self.total -= 1

    def later(self, owner: str, count: int) -> None:
        """So many more (or fewer) wait in a batch to be given to the sandbox."""
        self._share(owner).later += count
        self.total += count

    @contextlib.contextmanager
    def place(self, owner: str) -> Iterator[None]:
        """For the length of one execution. Raises `Refused` (429) when there is none."""
        self.check(owner)
        self.enter(owner)
        try:
            yield
        finally:
            self.leave(owner)

    def hold(self, owner: str, size: int) -> None:
        """Count bytes of requests in memory, or take them off. Raises `Refused` (429) for too many; they count."""
        share = self._share(owner)
        share.bytes += size
        self.held_bytes += size
        if size > 0 and (share.bytes > MAX_HELD_BYTES // 2 or self.held_bytes > MAX_HELD_BYTES):
            raise overloaded(f"{share.bytes} bytes of your requests are in memory", max(1.0, self.expected_wait(owner)))

    def took(self, seconds: float) -> None:
        """Learn how long an execution took."""
        self._mean_s += _SMOOTHING * (seconds - self._mean_s)
