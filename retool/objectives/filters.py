"""Scope 1: which samples are learnt from, decided on raw accuracy before anything is scored (A §0.7, step 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from retool.objectives.advantages import SAME
from retool.objectives.batch import Batch

FilterKind = Literal["keep", "drop", "mask_loss"]


def mixed_groups(accuracy: Tensor, group: Tensor, counted: Tensor) -> Tensor:
    """[B] bool: the sample's group holds counted samples of different accuracy."""
    _, g = torch.unique(group, return_inverse=True)
    n_groups = int(g.max()) + 1 if len(g) else 0
    high = torch.full((n_groups,), -torch.inf, dtype=accuracy.dtype)
    high = high.scatter_reduce(0, g[counted], accuracy[counted], "amax")
    low = torch.full((n_groups,), torch.inf, dtype=accuracy.dtype)
    low = low.scatter_reduce(0, g[counted], accuracy[counted], "amin")
    return (high - low > SAME)[g]


@dataclass(frozen=True)
class AccuracyFilter:
    """What happens to groups in which every answer is right or every answer is wrong.

    `keep`: nothing. `drop`: the group leaves the batch. `mask_loss`: it stays in all statistics and leaves the loss.
    """

    kind: FilterKind = "keep"

    def __call__(self, batch: Batch) -> tuple[Batch, dict[str, float]]:
        if not len(batch):
            return batch, {}
        mixed = mixed_groups(batch["accuracy"], batch["group"], batch["in_baseline"])
        metrics = {"filter/mixed_groups": float(mixed.double().mean())}
        if self.kind == "drop":
            batch = batch.take(torch.nonzero(mixed)[:, 0])
        elif self.kind == "mask_loss":
            batch = batch.with_samples(in_loss=batch["in_loss"] & mixed)
        return batch, metrics
