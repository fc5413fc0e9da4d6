"""Scope 2: from scores (and values) to the column `advantage`, once a rollout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from retool.objectives.advantages import (
    GroupKind,
    Std,
    adaptive_lambda,
    gae,
    group_advantage,
    reward_to_go,
    token_rewards,
    whiten,
)
from retool.objectives.batch import Batch


@dataclass(frozen=True)
class LengthAdaptive:
    """λ = 1 - 1/(alpha · action tokens), clamped (VAPO)."""

    alpha: float
    low: float = 0.0
    high: float = 1 - 1e-4


@dataclass(frozen=True)
class Gae:
    """Critic-based advantages with skip; `lam_value` makes the critic's target (`return`), which is never whitened.

    Reads `critic_value`: the critic's values in units of the reward. `bootstrap`: V of the state after the last token
    of samples that were truncated, instead of 0.
    """

    gamma: float = 1.0
    lam: float | LengthAdaptive = 1.0
    lam_value: float = 1.0
    whiten: bool = True
    unbiased: bool = True
    bootstrap: bool = False

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"value", "score", *(("bootstrap", "truncated") if self.bootstrap else ())})

    def __call__(self, batch: Batch) -> Batch:
        action, values = batch["action"], batch["critic_value"]
        rewards = token_rewards(batch)
        boot = None
        if self.bootstrap:
            boot = torch.where(batch["truncated"], batch["critic_bootstrap"], 0.0)
        counts = batch.sum(action.to(values.dtype))
        if isinstance(self.lam, LengthAdaptive):
            lam = adaptive_lambda(counts, self.lam.alpha, self.lam.low, self.lam.high)
        else:
            lam = torch.full_like(counts, self.lam)
        advantage = gae(rewards, values, action, batch, self.gamma, lam, boot)
        target = gae(rewards, values, action, batch, self.gamma, torch.full_like(counts, self.lam_value), boot)
        target = torch.where(action, target + values, torch.zeros_like(values))
        if self.whiten:
            advantage = whiten(advantage, action, self.unbiased)
        return batch.with_tokens(advantage=advantage, **{"return": target})


@dataclass(frozen=True)
class GroupRelative:
    """One advantage a sample, from its group's scores, on all its action tokens."""

    kind: GroupKind = "zscore"
    std: Std = "sample"
    eps: float = 1e-6
    reads: frozenset[str] = frozenset({"score", "group", "in_baseline"})

    def __call__(self, batch: Batch) -> Batch:
        a = group_advantage(batch["score"], batch["group"], batch["in_baseline"], self.kind, self.std, self.eps)
        return _spread(batch, a)


@dataclass(frozen=True)
class Raw:
    """The score itself is the advantage."""

    reads: frozenset[str] = frozenset({"score"})

    def __call__(self, batch: Batch) -> Batch:
        return _spread(batch, batch["score"])


@dataclass(frozen=True)
class NoAdvantage:
    """For terms that need none: imitation, pairs."""

    reads: frozenset[str] = frozenset()

    def __call__(self, batch: Batch) -> Batch:
        return batch


def _spread(batch: Batch, advantage: Tensor) -> Batch:
    """Per-sample advantages onto tokens. A KL in the reward is added as reward-to-go, after normalisation."""
    tokens = torch.where(batch["action"], batch.spread(advantage), 0.0)
    if "kl_reward" in batch:
        tokens = tokens + reward_to_go(batch["kl_reward"], batch["action"], batch)
    return batch.with_tokens(advantage=tokens)
