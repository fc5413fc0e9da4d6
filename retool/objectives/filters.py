"""Scope 1: which samples are learnt from, decided on raw accuracy before anything is scored (A §0.7, step 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from retool.objectives.advantages import SAME
from retool.objectives.base import GroupFilter
from retool.objectives.batch import Batch
from retool.objectives.keyed import sample_uniform

FilterKind = Literal["keep", "drop", "mask_loss"]
Groups = Literal["uniform", "all_wrong", "all_right"]


def group_range(accuracy: Tensor, group: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """([B] lowest, [B] highest accuracy among the counted members of each sample's group); inf, -inf for none."""
    _, g = torch.unique(group, return_inverse=True)
    n_groups = int(g.max()) + 1 if len(g) else 0
    high = torch.full((n_groups,), -torch.inf, dtype=accuracy.dtype)
    high = high.scatter_reduce(0, g[counted], accuracy[counted], "amax")
    low = torch.full((n_groups,), torch.inf, dtype=accuracy.dtype)
    low = low.scatter_reduce(0, g[counted], accuracy[counted], "amin")
    return low[g], high[g]


def mixed_groups(accuracy: Tensor, group: Tensor, counted: Tensor) -> Tensor:
    """[B] bool: the sample's group holds counted samples of different accuracy."""
    low, high = group_range(accuracy, group, counted)
    return high - low > SAME


@dataclass(frozen=True)
class AccuracyFilter:
    """What happens to groups in which every answer is right or every answer is wrong.

    `keep`: nothing. `drop`: the group leaves the batch. `mask_loss`: it stays in all statistics and leaves the loss.
    `groups`: both sorts, or only those that are all wrong (accuracy at most ½), or all right.
    """

    kind: FilterKind = "keep"
    groups: Groups = "uniform"

    def __call__(self, batch: Batch) -> tuple[Batch, dict[str, float]]:
        if not len(batch):
            return batch, {}
        low, high = group_range(batch["accuracy"], batch["group"], batch["in_baseline"])
        mixed = high - low > SAME
        metrics = {"filter/mixed_groups": float(mixed.double().mean())}
        stays = {"uniform": mixed, "all_wrong": mixed | (high > 0.5), "all_right": mixed | (low <= 0.5)}[self.groups]
        if self.kind == "drop":
            batch = batch.take(torch.nonzero(stays)[:, 0])
        elif self.kind == "mask_loss":
            batch = batch.with_samples(in_loss=batch["in_loss"] & stays)
        return batch, metrics


@dataclass(frozen=True)
class SampleMask:
    """Samples that leave the loss one by one and stay in their group's statistics.

    `positives`: wrong answers leave (RAFT). `void`: trajectories with a void turn leave (SimpleTIR, 2509.02479).
    `overlong`: truncated ones leave (DAPO); with `in_baseline` off also the statistics.
    """

    positives: bool = False
    void: bool = False
    overlong: bool = False
    in_baseline: bool = True

    def __call__(self, batch: Batch) -> tuple[Batch, dict[str, float]]:
        if not len(batch):
            return batch, {}
        metrics: dict[str, float] = {}
        leaving: dict[str, Tensor] = {}
        if self.positives:
            leaving["wrong"] = batch["accuracy"] <= 0.5
        if self.void:
            leaving["void"] = batch["void"]
        if self.overlong:
            leaving["overlong"] = batch["truncated"]
        for name, leaves in leaving.items():
            batch = batch.with_samples(in_loss=batch["in_loss"] & ~leaves)
            metrics[f"filter/{name}"] = float(leaves.double().mean())
        if self.overlong and not self.in_baseline:
            batch = batch.with_samples(in_baseline=batch["in_baseline"] & ~batch["truncated"])
        return batch, metrics


@dataclass(frozen=True)
class ResampleOnCorrect:
    """rStar2-Agent's RoC (2508.20722): of each group, ceil(`share` · n) stay: wrong answers in proportion and at
    random, right ones with the smallest penalty; at least two of each sort where there are two and room for them.

    Penalty: share of failed calls (½ without a call) plus the sample column `format_penalty`. Random choices and ties
    are keyed by the trajectory. What is not chosen leaves the batch, statistics included.
    """

    share: float = 0.5
    seed: int = 0

    def __call__(self, batch: Batch) -> tuple[Batch, dict[str, float]]:
        if not len(batch):
            return batch, {}
        penalty = torch.where(batch["tool_calls"] > 0, batch["tool_error_rate"], 0.5) + batch["format_penalty"]
        draw = sample_uniform(batch, self.seed)
        right = batch["accuracy"] > 0.5
        kept: list[int] = []
        for group in torch.unique(batch["group"]):
            mine = batch["group"] == group
            losers, winners = torch.nonzero(mine & ~right)[:, 0], torch.nonzero(mine & right)[:, 0]
            n = math.ceil(self.share * int(mine.sum()) - 1e-9)
            least = min(2, n // 2)
            fewest = max(min(least, len(losers)), n - len(winners))
            most = min(len(losers), n - min(least, len(winners)))
            few = min(max(round(n * len(losers) / int(mine.sum())), fewest), most)
            losers = losers[torch.argsort(draw[losers])]
            winners = winners[torch.argsort(draw[winners])]
            winners = winners[torch.argsort(penalty[winners], stable=True)]
            kept += [*losers[:few].tolist(), *winners[: n - few].tolist()]
        rows = torch.tensor(sorted(kept))
        metrics = {"filter/roc_penalty": float(penalty[rows].mean())} if len(rows) else {}
        return batch.take(rows), metrics


@dataclass(frozen=True)
class Filters:
    """Several filters, one after the other."""

    parts: tuple[GroupFilter, ...]

    def __call__(self, batch: Batch) -> tuple[Batch, dict[str, float]]:
        metrics: dict[str, float] = {}
        for part in self.parts:
            batch, more = part(batch)
            metrics |= more
        return batch, metrics
