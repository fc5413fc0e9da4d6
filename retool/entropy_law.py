"""The law R = -a·exp(H) + b between reward and entropy over a run (2505.22617, section 2; spec B 3.1).

With entropy left alone, reward is bought with entropy at a fixed rate, and b - a is the reward at H = 0: the ceiling.
The law is about *uncontrolled* entropy; a run that bends it (clip-higher, Clip-Cov, KL-Cov) shows in a worse fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class EntropyLaw:
    """`r2`: share of the reward's variance that the fit explains. `n`: points."""

    a: float
    b: float
    r2: float
    n: int

    @property
    def ceiling(self) -> float:
        """Predicted reward when all entropy is spent."""
        return self.b - self.a

    def reward(self, entropy: float) -> float:
        """Predicted reward at an entropy in nats."""
        return self.b - self.a * math.exp(entropy)


def fit(entropies: Sequence[float], rewards: Sequence[float]) -> EntropyLaw | None:
    """Least squares on (exp(H), R); None with fewer than three points or without any change in entropy. Points that are
    not finite are left out. Raises `ValueError` for sequences of different length."""
    points = [
        (math.exp(h), r) for h, r in zip(entropies, rewards, strict=True) if math.isfinite(h) and math.isfinite(r)
    ]
    n = len(points)
    if n < 3:
        return None
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    var_x = sum((x - mean_x) ** 2 for x, _ in points)
    var_y = sum((y - mean_y) ** 2 for _, y in points)
    if var_x <= 1e-12 * n:
        return None
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / var_x
    left = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in points)
    return EntropyLaw(-slope, mean_y - slope * mean_x, 1 - left / var_y if var_y > 0 else 1.0, n)


def fit_run(metrics: Sequence[Mapping[str, float]]) -> EntropyLaw | None:
    """Over the steps of a run's ledger that have both an entropy and an accuracy."""
    rows = [m for m in metrics if "entropy" in m and "rollout/accuracy" in m]
    return fit([m["entropy"] for m in rows], [m["rollout/accuracy"] for m in rows])
