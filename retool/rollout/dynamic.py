"""Which problems a step samples and which groups it trains on: in order, dynamic (DAPO), or by priority.

Dynamic sampling (2503.14476; spec A.4): problems are drawn, batch by batch, until `rollout.prompts` groups hold right
*and* wrong answers; the others teach a group baseline nothing. Judged on raw accuracy, before any shaping of rewards.
Surplus groups are carried over to the next step, with the policy version that sampled them, or discarded.

A position in the order of problems and the ids of carried groups are all there is to remember: they stand in the
ledger beside the step's samples, and the groups themselves in the rollout log, so a killed run goes on exactly.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from retool.config import Recipe
from retool.objectives.advantages import SAME
from retool.objectives.keyed import key_of, problem_key
from retool.records import Group, Problem
from retool.rollout.log import RolloutLog

Weights = Mapping[str, float]


class Collect(Protocol):
    """What `Collector.collect` does."""

    def __call__(
        self, step: int, problems: Sequence[Problem], version: int, *, first: int = 0
    ) -> Awaitable[list[Group]]: ...


@dataclass
class Drawn:
    """`groups`: to train on, at most `rollout.prompts` of them when sampling is dynamic. `sampled`: everything that was
    sampled in this step, trained on or not: what accuracy is measured on. `metrics`: names start with `dynamic/`."""

    groups: list[Group]
    sampled: list[Group]
    metrics: dict[str, float] = field(default_factory=dict)


class Draw:
    """One run's draws. `memory`: what the ledger's last finished step remembered, None at the start of a run."""

    def __init__(
        self,
        recipe: Recipe,
        problems: Sequence[Problem],
        collect: Collect,
        log: RolloutLog,
        memory: Mapping[str, Any] | None = None,
    ) -> None:
        self.recipe, self.problems, self.collect = recipe, problems, collect
        self.cursor = int(memory["cursor"]) if memory else 0
        self.carried: list[Group] = [log.read_group(g) for g in memory["carried"]] if memory else []

    @property
    def remembers(self) -> bool:
        """Whether steps depend on earlier ones, so that the ledger must hold `memory`."""
        return self.recipe.rollout.dynamic.kind != "none"

    def memory(self) -> dict[str, Any] | None:
        """What the next step needs from this one."""
        return {"cursor": self.cursor, "carried": [g.id for g in self.carried]} if self.remembers else None

    async def step(self, step: int, version: int, weights: Weights | None = None) -> Drawn:
        """`version`: of the policy now. `weights`: of problems by `weight_key`, for `rollout.priority: tracker`."""
        rollout = self.recipe.rollout
        if not self.remembers:
            problems = self._next(step, 0, rollout.prompts, weights, [], step * rollout.prompts)
            groups = await self.collect(step, problems, version)
            return Drawn(groups, groups)
        dynamic = rollout.dynamic
        fresh = [g for g in self.carried if version - sampled_at(g) <= dynamic.max_staleness]
        stale = len(self.carried) - len(fresh)
        kept, sampled, seen, batches = list(fresh), [], [g.problem for g in fresh], 0
        while len(kept) < rollout.prompts and batches < dynamic.max_batches:
            count = dynamic.batch or rollout.prompts
            problems = self._next(step, batches, count, weights, seen, self.cursor)
            self.cursor += count
            groups = await self.collect(step, problems, version, first=len(sampled))
            seen += problems
            sampled += groups
            kept += [g for g in groups if mixed(g)]
            batches += 1
        groups, rest = kept[: rollout.prompts], kept[rollout.prompts :]
        # what would be too old at the next step is not carried at all
        self.carried = [g for g in rest if version + 1 - sampled_at(g) <= dynamic.max_staleness]
        return Drawn(
            groups,
            sampled,
            {
                "dynamic/batches": float(batches),
                "dynamic/mixed": sum(map(mixed, sampled)) / len(sampled) if sampled else math.nan,
                "dynamic/starved": float(rollout.prompts - len(groups)),
                "dynamic/from_before": float(min(len(fresh), rollout.prompts)),
                "dynamic/carried": float(len(self.carried)),
                "dynamic/discarded": float(stale + len(rest) - len(self.carried)),
            },
        )

    def _next(
        self, step: int, batch: int, count: int, weights: Weights | None, seen: Sequence[Problem], cursor: int
    ) -> list[Problem]:
        if self.recipe.rollout.priority == "none":
            return problems_from(self.problems, cursor, count, self.recipe.seed)
        return by_priority(self.problems, weights or {}, count, (self.recipe.seed, step, batch), seen)


def mixed(group: Group) -> bool:
    """0 < right < valid: at least two members that could be judged and said something, and not all judged alike."""
    found = [t.reward.accuracy for t in group.usable if t.reward is not None and t.transcript.n_action]
    values = [a for a in found if a is not None]
    return len(values) >= 2 and max(values) - min(values) > SAME


def sampled_at(group: Group) -> int:
    """The oldest policy version among the group's tokens; groups without tokens are as old as can be."""
    versions = [v for t in group.trajectories for s in t.transcript.policy_spans for _, v in s.versions]
    return min(versions, default=-(1 << 30))


def problems_from(problems: Sequence[Problem], start: int, count: int, seed: int) -> list[Problem]:
    """`count` problems from position `start` on: passes over the whole set, each pass in its own order. A function of
    its arguments only, so a resumed run draws the same ones, none skipped and none twice in a pass."""
    orders: dict[int, list[int]] = {}
    out: list[Problem] = []
    for i in range(start, start + count):
        epoch, at = divmod(i, len(problems))
        if epoch not in orders:
            orders[epoch] = list(range(len(problems)))
            random.Random(f"problems/{seed}/{epoch}").shuffle(orders[epoch])
        out.append(problems[orders[epoch][at]])
    return out


def weight_key(problem: Problem) -> str:
    """The name under which objectives know a problem: the batch's column `problem`, as text."""
    return str(problem_key(problem.id))


def by_priority(
    problems: Sequence[Problem], weights: Weights, count: int, key: Sequence[int], seen: Sequence[Problem] = ()
) -> list[Problem]:
    """`count` problems without replacement, each with a chance that grows with its weight (Efraimidis, Spirakis 2006:
    the largest u^(1/w)), u keyed by `key` and the problem. Problems without a weight count as the heaviest: nothing is
    known of them yet. Those in `seen` come only when there are no others, and problems repeat when they are too few."""
    used = {p.id for p in seen}
    most = max(weights.values(), default=1.0)

    def rank(problem: Problem) -> tuple[bool, float]:
        weight = max(float(weights.get(weight_key(problem), most)), 1e-9)
        u = ((key_of("priority", *key, problem.id) & ((1 << 53) - 1)) + 0.5) / (1 << 53)
        return (problem.id not in used, math.log(u) / weight)

    best = heapq.nlargest(min(count, len(problems)), problems, key=rank)
    return [best[i % len(best)] for i in range(count)]
