"""Scope 2: from scores (and values) to the column `advantage`, once a rollout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from retool.objectives.advantages import (
    GroupKind,
    Std,
    adaptive_lambda,
    discounted_returns,
    gae,
    group_advantage,
    reward_to_go,
    token_rewards,
    turn_returns,
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
        return spread_advantage(batch, a)


@dataclass(frozen=True)
class Raw:
    """The score itself is the advantage."""

    reads: frozenset[str] = frozenset({"score"})

    def __call__(self, batch: Batch) -> Batch:
        return spread_advantage(batch, batch["score"])


@dataclass(frozen=True)
class Ones:
    """Every sample is as good as any other: with a filter on right answers, RAFT's advantage."""

    reads: frozenset[str] = frozenset()

    def __call__(self, batch: Batch) -> Batch:
        return spread_advantage(batch, torch.ones_like(batch["score"]))


@dataclass(frozen=True)
class Returns:
    """Discounted sum of the token rewards to the end, whitened over the rollout (REINFORCE++, 2501.03262).

    The score stands on the last action token, a KL penalty on every token. `baseline`: the group's mean is taken off
    the score first (its -baseline variant; no deviation of the group enters).
    """

    gamma: float = 1.0
    baseline: bool = False
    whiten: bool = True
    unbiased: bool = True
    reads: frozenset[str] = frozenset({"score"})

    def __call__(self, batch: Batch) -> Batch:
        action = batch["action"]
        if self.baseline:
            centred = group_advantage(batch["score"], batch["group"], batch["in_baseline"], "mean")
            advantage = discounted_returns(token_rewards(batch.with_samples(score=centred)), action, batch, self.gamma)
        else:
            advantage = discounted_returns(token_rewards(batch), action, batch, self.gamma)
        if self.whiten:
            advantage = whiten(advantage, action, self.unbiased)
        return batch.with_tokens(advantage=advantage)


@dataclass(frozen=True)
class TurnReturns:
    """One advantage a turn: its discounted return, normalised over all turns of the group (GTPO, 2511.14846).

    Reads the score (the last turn's reward) and, where there is one, the token column `turn_reward` (each turn's own
    reward on its last action token; `reward.turns` fills it). Turn-aware: the number of turns matters, their length
    does not.
    """

    gamma: float = 0.9
    std: Std = "sample"
    eps: float = 1e-6
    reads: frozenset[str] = frozenset({"score", "group", "in_baseline"})

    def __call__(self, batch: Batch) -> Batch:
        returns, row, segment = turn_returns(batch, self.gamma)
        if not len(returns):
            return batch.with_tokens(advantage=torch.zeros(batch.n_tokens, dtype=batch["score"].dtype))
        a = group_advantage(returns, batch["group"][row], batch["in_baseline"][row], "zscore", self.std, self.eps)
        return batch.with_tokens(advantage=torch.where(batch["action"], a[segment.clamp(min=0)], 0.0))


@dataclass(frozen=True)
class NoAdvantage:
    """For terms that need none: imitation, pairs."""

    reads: frozenset[str] = frozenset()

    def __call__(self, batch: Batch) -> Batch:
        return batch


def spread_advantage(batch: Batch, advantage: Tensor) -> Batch:
    """Per-sample advantages onto tokens. A KL in the reward is added as reward-to-go, after normalisation."""
    tokens = torch.where(batch["action"], batch.spread(advantage), 0.0)
    if "kl_reward" in batch:
        tokens = tokens + reward_to_go(batch["kl_reward"], batch["action"], batch)
    return batch.with_tokens(advantage=tokens)
