"""Scores as z-scores over a whole step (2503.23829; B §5): for estimators without a group baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from retool.records import Group, Trajectory

SAME = 1e-6
"""A standard deviation below this is rounding: the scores are equal."""


def zscores(scores: Sequence[float]) -> list[float]:
    """(r - mean) / population standard deviation; zeros when all are equal."""
    if not scores:
        return []
    mean = math.fsum(scores) / len(scores)
    std = math.sqrt(math.fsum((s - mean) ** 2 for s in scores) / len(scores))
    return [(s - mean) / std if std > SAME else 0.0 for s in scores]


def zscore_groups(groups: Sequence[Group]) -> list[Group]:
    """Copies of the groups with scores normalised over all usable trajectories of the step; accuracy and the log stay
    as they are."""
    usable = [t for g in groups for t in g.usable]
    normal = dict(zip((t.id for t in usable), zscores([t.reward.score for t in usable if t.reward is not None])))

    def scaled(t: Trajectory) -> Trajectory:
        if t.reward is None or t.id not in normal:
            return t
        return replace(t, reward=replace(t.reward, score=normal[t.id]))

    return [replace(g, trajectories=[scaled(t) for t in g.trajectories]) for g in groups]
