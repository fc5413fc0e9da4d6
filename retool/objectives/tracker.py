"""A baseline without groups: what each problem has given so far (single-stream policy optimisation, 2509.13232).

The statistics live in `ObjectiveState.extra["problems"]`: problem key -> [observations, mean score, mean accuracy,
mean log-prob a token at the last visit].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from retool.objectives.advantages import group_advantage
from retool.objectives.base import ObjectiveState
from retool.objectives.batch import Batch
from retool.objectives.estimators import spread_advantage

PROBLEMS = "problems"


@dataclass(frozen=True)
class Tracker:
    """Advantage = score - the problem's tracked value before this rollout, normalised over the whole rollout.

    A visit with k samples leaves keep = 2^(-drift / `half_life`) of the past, in [`min_keep`, `max_keep`]; then
    n <- keep · n + k and the mean moves by (scores - mean) / n: the mean of the paper's Beta(a, b), for any score.
    A new problem starts at the mean of all known ones (of this rollout when none is known) with 1 / (1 - `min_keep`)
    observations. `drift`: the change of the mean log-prob a token since the last visit; the paper's KL to the policy
    of the last visit would need its answers scored again.
    """

    min_keep: float = 0.875
    max_keep: float = 0.96
    half_life: float = 0.06
    eps: float = 1e-6
    reads: frozenset[str] = frozenset({"score", "accuracy"})

    def __call__(self, batch: Batch) -> Batch:
        return self.estimate(batch, ObjectiveState())[0]

    def estimate(self, batch: Batch, state: ObjectiveState) -> tuple[Batch, ObjectiveState]:
        known: dict[str, list[float]] = dict(state.extra.get(PROBLEMS, {}))
        score, accuracy, counted = batch["score"], batch["accuracy"], batch["in_baseline"]
        tokens = batch.sum(batch["action"].to(score.dtype)).clamp(min=1)
        zero = torch.zeros_like(batch["logp_rollout"])
        logp = batch.sum(torch.where(batch["action"], batch["logp_rollout"], zero)) / tokens
        prior = _prior(known, score[counted], accuracy[counted])
        baseline = torch.zeros_like(score)
        for problem in torch.unique(batch["problem"]).tolist():
            mine = batch["problem"] == problem
            n, value, right, before = known.get(str(problem), [1 / (1 - self.min_keep), *prior, math.nan])
            baseline[mine] = value
            mine = mine & counted
            k = int(mine.sum())
            if not k:
                continue
            now = float(logp[mine].mean())
            drift = 0.0 if math.isnan(before) else abs(now - before)
            keep = min(max(2 ** (-drift / self.half_life), self.min_keep), self.max_keep)
            n = keep * n + k
            value += (float(score[mine].sum()) - k * value) / n
            right += (float(accuracy[mine].sum()) - k * right) / n
            known[str(problem)] = [n, value, right, now]
        one_group = torch.zeros(len(batch), dtype=torch.int64)
        advantage = group_advantage(score - baseline, one_group, counted, "zscore", eps=self.eps)
        return spread_advantage(batch, advantage), replace(state, extra={**state.extra, PROBLEMS: known})


def _prior(known: dict[str, list[float]], score: Any, accuracy: Any) -> tuple[float, float]:
    """(mean score, mean accuracy) that a problem never seen is taken to have."""
    if known:
        rows = list(known.values())
        return sum(r[1] for r in rows) / len(rows), sum(r[2] for r in rows) / len(rows)
    return (float(score.mean()), float(accuracy.mean())) if len(score) else (0.0, 0.0)


def priorities(state: ObjectiveState, floor: float = 0.05) -> dict[str, float]:
    """{problem key (`keyed.problem_key`, as text): weight √(p (1 - p)) + `floor`} of every tracked problem, p its
    tracked accuracy: problems that are sometimes solved teach most. Empty when the objective tracks none."""
    rows: dict[str, list[float]] = state.extra.get(PROBLEMS, {})
    solved = {key: min(max(row[2], 0.0), 1.0) for key, row in rows.items()}
    return {key: math.sqrt(p * (1 - p)) + floor for key, p in solved.items()}
