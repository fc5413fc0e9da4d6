"""Objectives of the phases around RL: value pretraining, and training a reward model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from retool.objectives.base import Dropped, ObjectiveError, OffPolicy, RoleName, Structure, TokenSelector
from retool.objectives.batch import Batch, Forward
from retool.objectives.estimators import Gae, NoAdvantage
from retool.objectives.objective import Objective
from retool.objectives.terms import PairTerm, ValueTerm

RewardHead = Literal["pairwise", "pointwise"]
AFTER = frozenset({"after"})


def value_pretraining(objective: Objective) -> Objective:
    """Only the critic learns, from Monte-Carlo returns (λ = γ = 1) of the frozen policy, without a value clip
    (VC-PPO, 2503.01491; A §6.1, A.5). Raises `ObjectiveError` for an objective without a critic."""
    if objective.critic is None:
        raise ObjectiveError(f"{objective.name} has no critic to pretrain")
    return Objective(
        name=f"{objective.name}/value",
        advantage=Gae(gamma=1.0, lam=1.0, lam_value=1.0, whiten=False),
        terms=(ValueTerm(clip=None),),
        structure=objective.structure,
        off_policy=OffPolicy(old="detached"),
        critic=replace(objective.critic, warmup=0),
        temperature=objective.temperature,
        reward_clip=objective.reward_clip,
    )


def reward_model(head: RewardHead) -> Objective:
    """A scalar after the last token of a sample, trained on pairs or on single labelled samples."""
    term = PairwiseReward() if head == "pairwise" else PointwiseReward()
    return Objective(
        name=f"reward_model/{head}",
        advantage=NoAdvantage(),
        terms=(term,),
        structure=Structure("pairs" if head == "pairwise" else "flat"),
        off_policy=OffPolicy(old="detached"),
        train_on="demo",
    )


@dataclass(frozen=True)
class PairwiseReward(PairTerm):
    """-log σ(r_chosen - r_rejected) (Bradley-Terry; 2203.02155): the sample of higher score is chosen."""

    name: str = "reward"
    role: RoleName = "critic"
    needs: frozenset[str] = AFTER
    reads: frozenset[str] = frozenset({"pair", "score", "in_loss"})

    def numerator(self, batch: Batch, forward: Forward) -> Tensor:
        chosen, rejected = self._match(batch)
        reward = forward.need("after")
        return (batch[f"weight/{self.name}"][chosen] * -F.logsigmoid(reward[chosen] - reward[rejected])).sum()


@dataclass(frozen=True)
class PointwiseReward:
    """Binary cross-entropy of σ(r) with `accuracy`, mean over samples."""

    name: str = "reward"
    coef: float = 1.0
    role: RoleName = "critic"
    needs: frozenset[str] = AFTER
    reads: frozenset[str] = frozenset({"accuracy", "in_loss"})
    current: frozenset[str] = frozenset()

    def plan(
        self, batch: Batch, dropped: Dropped, selectors: tuple[TokenSelector, ...], now: Forward | None
    ) -> tuple[Batch, float]:
        weight = batch["in_loss"].to(batch["accuracy"].dtype)
        return batch.with_samples(**{f"weight/{self.name}": weight}), float(weight.sum())

    def numerator(self, batch: Batch, forward: Forward) -> Tensor:
        reward = forward.need("after")
        loss = F.binary_cross_entropy_with_logits(reward, batch["accuracy"].to(reward.dtype), reduction="none")
        return (batch[f"weight/{self.name}"] * loss).sum()

    def diagnostics(self, batch: Batch, forward: Forward) -> dict[str, Tensor]:
        return {}


def reward_accuracy(reward: Tensor, batch: Batch, head: RewardHead) -> float:
    """Share of pairs whose chosen sample has the higher reward, or of samples that σ(r) > ½ labels rightly. `reward`
    [B]."""
    if head == "pairwise":
        chosen, rejected = PairwiseReward()._match(batch)
        right = reward[chosen] > reward[rejected]
    else:
        right = (reward > 0) == (batch["accuracy"] > 0.5)
    return float(right.to(torch.float64).mean())
