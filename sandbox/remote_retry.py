"""When to try again, and when not to: a budget of retries, a breaker for each server, jittered waiting."""

from __future__ import annotations

import random
import time

_FIRST_WAIT_S = 0.05
_LONGEST_WAIT_S = 5.0


def backoff(attempt: int, least: float, rng: random.Random) -> float:
    """Seconds to wait before attempt number `attempt` (from 1): at random below a bound that doubles, beyond `least`,
    an overloaded server's own wish, and up to a tenth of that so that its clients do not come back as one."""
    wait = rng.uniform(0.0, min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** min(attempt, 10)))
    return least * (1.0 + 0.1 * rng.random()) + wait


class RetryBudget:
    """Retries may be `ratio` of the requests, beyond a floor: when everything fails, clients must not make it worse.

    Tokens: each request brings `ratio`, each retry takes one; the floor is refilled with time. Waiting as an overloaded
    server asked is no retry in this sense: it is free.
    """

    def __init__(self, ratio: float = 0.1, floor: float = 256.0, floor_per_s: float = 8.0) -> None:
        self.ratio, self.floor, self.floor_per_s = ratio, floor, floor_per_s
        self.tokens = floor
        self.spent = 0
        self.refused = 0
        self._filled = time.monotonic()

    def deposit(self) -> None:
        """A request is made."""
        now = time.monotonic()
        if self.tokens < self.floor:
            self.tokens = min(self.floor, self.tokens + (now - self._filled) * self.floor_per_s)
        self._filled = now
        self.tokens = min(self.tokens + self.ratio, 4.0 * self.floor)

    def withdraw(self) -> bool:
        """Whether a retry may be made."""
        if self.tokens < 1.0:
            self.refused += 1
            return False
        self.tokens -= 1.0
        self.spent += 1
        return True


class Breaker:
    """Closed: requests pass. After `threshold` failures in a row it opens for `open_s`, doubling up to `most_s`; then
    one request is let through to see."""

    def __init__(self, threshold: int = 5, open_s: float = 0.5, most_s: float = 15.0) -> None:
        self.threshold, self.open_s, self.most_s = threshold, open_s, most_s
        self.opened = 0
        self._failures = 0
        self._times = 0
        self._until = 0.0
        self._probing = False

    @property
    def closed(self) -> bool:
        """Whether everything passes."""
        return self._until == 0.0

    def wait_s(self) -> float:
        """Seconds until a request may pass; 0 when one may now."""
        if self.closed:
            return 0.0
        left = self._until - time.monotonic()
        if left > 0:
            return left
        return 0.05 if self._probing else 0.0

    def enter(self) -> bool:
        """A request passes; True when it is the one that probes. To be told of its end by `succeed`, `fail`, `drop`."""
        if not self.closed:
            self._probing = True
            return True
        return False

    def succeed(self) -> None:
        """The server answered."""
        self._failures = self._times = 0
        self._until = 0.0
        self._probing = False

    def hold(self, seconds: float) -> None:
        """The server is silent so far: nothing passes for so long, unless it answers."""
        self._until = time.monotonic() + seconds

    def drop(self, probing: bool) -> None:
        """The request was given up by its caller: nothing is known."""
        if probing:
            self._probing = False

    def fail(self, *, at_once: bool = False) -> None:
        """The server could not be reached or is not fit for work. `at_once`: it said so itself."""
        self._failures += 1
        if at_once or not self.closed or self._failures >= self.threshold:
            if time.monotonic() >= self._until:  # others that were under way say nothing new
                self._until = time.monotonic() + min(self.most_s, self.open_s * 2.0 ** min(self._times, 10))
                self._times += 1
                self.opened += 1
            self._probing = False
