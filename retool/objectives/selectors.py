"""Scope 3: which tokens of a mini-batch a term looks at. Every population is the action tokens, never tool output."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from retool.objectives.aggregate import Rule
from retool.objectives.batch import Batch, Forward
from retool.objectives.keyed import token_uniform
from retool.objectives.ratio import old_logp, token_ratio
from retool.objectives.surrogate import clip_fractions


@dataclass(frozen=True)
class LowProbability:
    """Tokens where the policy was really deciding: exp(logp_old) < `below` (SPO, 2505.23564: 0.9)."""

    below: float = 0.9
    rule: Rule = "kept"
    reads: frozenset[str] = frozenset({"logp_old"})
    current: frozenset[str] = frozenset()

    def __call__(self, batch: Batch, mask: Tensor, current: Forward | None) -> Tensor:
        return mask & (batch["logp_old"] < math.log(self.below))


@dataclass(frozen=True)
class EntropyQuantile:
    """The `share` of tokens of highest (or lowest) entropy (2506.01939: top 0.2); exactly max(1, ceil(N·share)) of
    them, ties broken by key.

    `scope`: where N is counted: the mini-batch, the whole rollout, or each sequence by itself. `source`: entropy of the
    old policy, taken once a rollout, or of the current one, so that the choice moves with the updates.
    """

    share: float = 0.2
    side: Literal["top", "bottom"] = "top"
    rule: Rule = "kept"
    scope: Literal["minibatch", "rollout", "sequence"] = "minibatch"
    source: Literal["old", "current"] = "old"

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"entropy"}) if self.source == "old" else frozenset()

    @property
    def current(self) -> frozenset[str]:
        return frozenset({"entropy"}) if self.source == "current" else frozenset()

    @property
    def _column(self) -> str:
        return f"selected/{self.side}-{self.share}"

    def prepare(self, batch: Batch) -> Batch:
        """Scope 2: a choice over the whole rollout is made before it is cut into mini-batches."""
        if self.scope != "rollout":
            return batch
        return batch.with_tokens(**{self._column: self._choose(batch, batch["action"] & batch.spread("in_loss"), None)})

    def __call__(self, batch: Batch, mask: Tensor, current: Forward | None) -> Tensor:
        if self.scope == "rollout":
            return mask & batch[self._column]
        return self._choose(batch, mask, current)

    def _choose(self, batch: Batch, mask: Tensor, current: Forward | None) -> Tensor:
        entropy = batch["entropy"] if self.source == "old" else _need(current, "EntropyQuantile").need("entropy")
        value = entropy if self.side == "top" else -entropy
        tie = token_uniform(batch, 0)
        if self.scope != "sequence":
            return top_k(value, mask, _count(mask, self.share), tie)
        out = torch.zeros_like(mask)
        for row in range(len(batch)):
            here = slice(int(batch.offsets[row]), int(batch.offsets[row + 1]))
            if bool(mask[here].any()):
                out[here] = top_k(value[here], mask[here], _count(mask[here], self.share), tie[here])
        return out


@dataclass(frozen=True)
class RandomTokens:
    """A random `share` of the tokens, keyed by (seed, trajectory, index): the control of every other selector."""

    share: float = 0.2
    seed: int = 0
    rule: Rule = "kept"
    reads: frozenset[str] = frozenset({"key"})
    current: frozenset[str] = frozenset()

    def __call__(self, batch: Batch, mask: Tensor, current: Forward | None) -> Tensor:
        return mask & (token_uniform(batch, self.seed) < self.share)


@dataclass(frozen=True)
class TopCovariance:
    """The max(1, int(share·N)) tokens of highest (logp - mean)(A - mean): those that cost most entropy (KL-Cov,
    2505.22617). Over the whole mini-batch, so packing cannot change the choice. `source`: whose log-probs."""

    share: float = 2e-4
    rule: Rule = "all_act"
    source: Literal["current", "old"] = "current"

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"advantage"}) if self.source == "current" else frozenset({"advantage", "logp_old"})

    @property
    def current(self) -> frozenset[str]:
        return frozenset({"logp"}) if self.source == "current" else frozenset()

    def __call__(self, batch: Batch, mask: Tensor, current: Forward | None) -> Tensor:
        if not bool(mask.any()):
            return mask
        logp = batch["logp_old"] if self.source == "old" else _need(current, "TopCovariance").need("logp")
        covariance = token_covariance(logp, batch["advantage"], mask)
        return top_k(covariance, mask, max(1, int(self.share * int(mask.sum()))), token_uniform(batch, 0))


@dataclass(frozen=True)
class ClipCovariance:
    """All tokens but a random few of high covariance (Clip-Cov, 2505.22617): max(1, int(share·N)) of those with
    covariance in (`low`, `high`) that the PPO clip has not taken already, keyed by (seed, trajectory, token).

    What is left out has no loss and stays in the denominator. `source`: whose log-probs enter the covariance; the
    ratio of the clip is always current / old.
    """

    share: float = 2e-4
    low: float = 1.0
    high: float = 5.0
    clip_low: float | None = 1.0
    clip_high: float | None = 1.0
    seed: int = 0
    rule: Rule = "all_act"
    source: Literal["old", "current"] = "current"
    reads: frozenset[str] = frozenset({"advantage", "logp_old"})
    current: frozenset[str] = frozenset({"logp"})

    def __call__(self, batch: Batch, mask: Tensor, current: Forward | None) -> Tensor:
        if not bool(mask.any()):
            return mask
        logp, advantage = _need(current, "ClipCovariance").need("logp"), batch["advantage"]
        old = old_logp(batch, logp)
        covariance = token_covariance(old if self.source == "old" else logp, advantage, mask)
        low, high = clip_fractions(token_ratio(logp, old, mask), advantage, self.clip_low, self.clip_high)
        eligible = mask & ~low & ~high & (covariance > self.low) & (covariance < self.high)
        n = max(1, int(self.share * int(mask.sum())))
        draw = token_uniform(batch, self.seed)
        return mask & ~top_k(draw, eligible, n, draw)


@dataclass(frozen=True)
class OffPolicyMask:
    """All but the sequences of negative advantage that the current policy has left: mean over the sequence of
    logp_old - logp above `delta` (DeepSeek-V3.2). Such samples teach little and their gradient is large."""

    delta: float = 0.5
    rule: Rule = "all_act"
    reads: frozenset[str] = frozenset({"advantage", "logp_old"})
    current: frozenset[str] = frozenset({"logp"})

    def __call__(self, batch: Batch, mask: Tensor, current: Forward | None) -> Tensor:
        logp = _need(current, "OffPolicyMask").need("logp")
        zero = torch.zeros_like(logp)
        n = batch.sum(mask.to(logp.dtype)).clamp(min=1)
        gap = batch.sum(torch.where(mask, old_logp(batch, logp) - logp, zero)) / n
        advantage = batch.sum(torch.where(mask, batch["advantage"], zero)) / n
        return mask & ~((advantage < 0) & (gap > self.delta))[batch.row]


def _need(current: Forward | None, name: str) -> Forward:
    if current is None:
        raise ValueError(f"{name} needs the current outputs of the policy for the whole mini-batch")
    return current


def token_covariance(logp: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    """[N] (logp - mean logp)(A - mean A), means over the mask; 0 elsewhere."""
    covariance = (logp - logp[mask].mean()) * (advantage - advantage[mask].mean())
    return torch.where(mask, covariance, torch.zeros_like(covariance)).detach()


def top_k(value: Tensor, mask: Tensor, k: int, tie: Tensor) -> Tensor:
    """[N] bool: the k masked tokens of largest value; equal values are ordered by `tie`, never by position."""
    index = torch.nonzero(mask)[:, 0]
    index = index[torch.argsort(tie[index], stable=True)]
    order = torch.argsort(value[index], descending=True, stable=True)
    out = torch.zeros_like(mask)
    out[index[order[:k]]] = True
    return out


def _count(mask: Tensor, share: float) -> int:
    return max(1, math.ceil(int(mask.sum()) * share - 1e-9))
