"""Evaluation: sample answers to held-out problems, with the tool and with the string that opens a call banned.

retool eval MODEL PROBLEMS [--k 16] [--no-tool]
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from retool.config import Recipe
from retool.records import Problem, Trajectory
from retool.rollout.collector import Collector
from retool.statistics import summarise
from retool.workshop import Workshop

Progress = Callable[[int, int], None]


async def evaluate(
    workshop: Workshop,
    recipe: Recipe,
    problems: Sequence[Problem],
    *,
    tool: bool = True,
    progress: Progress | None = None,
) -> list[Trajectory]:
    """`recipe.eval.samples` trajectories a problem, sampled as `recipe.eval` says."""
    collector = Collector(workshop.engine, workshop.sandbox, workshop.codec, workshop.rewarder, recipe, log=None)
    return await collector.evaluate(problems, recipe.eval.samples, tool, progress=progress)


def scorecard(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """`summarise` over all and by family."""
    families: dict[str, list[Trajectory]] = defaultdict(list)
    for t in trajectories:
        families[t.problem.family or "all"].append(t)
    return {**summarise(trajectories), "by_family": {f: summarise(ts) for f, ts in sorted(families.items())}}
