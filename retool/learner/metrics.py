"""Numbers gathered over micro-batches, updates and ranks."""

from __future__ import annotations

import torch.distributed as dist

from retool.learner.world import World


class Mean:
    """Four ways to gather a number by name: the mean of what was added, a sum, a maximum, or the last value."""

    def __init__(self) -> None:
        self._total: dict[str, float] = {}
        self._count: dict[str, int] = {}
        self._max: dict[str, float] = {}
        self._set: dict[str, float] = {}

    def add(self, values: dict[str, float]) -> None:
        """Each name's result is the mean of what was added."""
        for name, value in values.items():
            self._total[name] = self._total.get(name, 0.0) + value
            self._count[name] = self._count.get(name, 0) + 1

    def sum(self, values: dict[str, float]) -> None:
        """Each name's result is the sum."""
        for name, value in values.items():
            self._total[name] = self._total.get(name, 0.0) + value
            self._count[name] = 1

    def max(self, values: dict[str, float]) -> None:
        """Each name's result is the largest value."""
        for name, value in values.items():
            self._max[name] = max(self._max.get(name, value), value)

    def set(self, values: dict[str, float]) -> None:
        """Each name's result is the last value."""
        self._set |= values

    def result(self) -> dict[str, float]:
        means = {name: total / self._count[name] for name, total in self._total.items()}
        return means | self._max | self._set

    def reduce(self, world: World) -> dict[str, float]:
        """The result over all ranks: sums are summed, maxima are maxima. Ranks may know different names."""
        if world.size == 1:
            return self.result()
        gathered: list[tuple[dict[str, float], dict[str, float]]] = [({}, {})] * world.size
        dist.all_gather_object(gathered, (self._total, self._max))
        out = Mean()
        for total, high in gathered:
            out.sum(total)
            out.max(high)
        return out.result()
