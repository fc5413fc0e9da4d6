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


@dataclass(frozen=True)
class LowProbability:
    """Tokens where the policy was really deciding: exp(logp_old) < `below` (SPO, 2505.23564: 0.9)."""

    below: float = 0.9
    rule: Rule = "kept"
    reads: frozenset[str] = frozenset({"logp_old"})
    current: bool = False

    def __call__(self, batch: Batch, mask: Tensor, current: Forward | None) -> Tensor:
        return mask & (batch["logp_old"] < math.log(self.below))


@dataclass(frozen=True)
class EntropyQuantile:
    """The `share` of tokens of highest (or lowest) entropy under the old policy; exactly max(1, ceil(N·share)) of
    them, ties broken by key (2506.01939: top 0.2)."""

    share: float = 0.2
    side: Literal["top", "bottom"] = "top"
    rule: Rule = "kept"
    reads: frozenset[str] = frozenset({"entropy"})
    current: bool = False

    def __call__(self, batch: Batch, mask: Tensor, current: Forward | None) -> Tensor:
        value = batch["entropy"] if self.side == "top" else -batch["entropy"]
        return top_k(value, mask, _count(mask, self.share), token_uniform(batch, 0))


@dataclass(frozen=True)
class RandomTokens:
    """A random `share` of the tokens, keyed by (seed, trajectory, index): the control of every other selector."""

    share: float = 0.2
    seed: int = 0
    rule: Rule = "kept"
    reads: frozenset[str] = frozenset({"key"})
    current: bool = False

    def __call__(self, batch: Batch, mask: Tensor, current: Forward | None) -> Tensor:
        return mask & (token_uniform(batch, self.seed) < self.share)


@dataclass(frozen=True)
class TopCovariance:
    """The max(1, int(share·N)) tokens of highest (logp - mean)(A - mean) under the current weights: those that cost
    most entropy (KL-Cov, 2505.22617). Scope is the whole mini-batch, so packing cannot change the choice."""

    share: float = 2e-4
    rule: Rule = "all_act"
    reads: frozenset[str] = frozenset({"advantage"})
    current: bool = True

    def __call__(self, batch: Batch, mask: Tensor, current: Forward | None) -> Tensor:
        if current is None:
            raise ValueError("TopCovariance needs the current log-probs of the mini-batch")
        if not bool(mask.any()):
            return mask
        covariance = token_covariance(current.need("logp"), batch["advantage"], mask)
        return top_k(covariance, mask, max(1, int(self.share * int(mask.sum()))), token_uniform(batch, 0))


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
