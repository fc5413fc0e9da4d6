"""The summands of a loss. A term plans its weights once an optimiser step and then only sums numerators."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from retool.objectives.aggregate import Aggregation, Rule
from retool.objectives.base import Dropped, ObjectiveError, RoleName, TokenSelector
from retool.objectives.batch import Batch, Forward
from retool.objectives.kl import Estimator, kl_estimate
from retool.objectives.ratio import old_logp, sequence_ratio, token_ratio
from retool.objectives.surrogate import cispo_surrogate, clip_fractions, clip_surrogate, sapo_surrogate
from retool.objectives.value import value_loss

LOGP, ENTROPY, VALUE = frozenset({"logp"}), frozenset({"entropy"}), frozenset({"value"})


@dataclass(frozen=True)
class TokenTerm:
    """Base of terms that are a weighted sum over tokens: `per_token` is all that a new one has to write.

    `select`: this term's own selectors. `selected`: whether the objective's selectors apply as well.
    """

    name: str
    coef: float = 1.0
    aggregation: Aggregation = field(default_factory=Aggregation)
    select: tuple[TokenSelector, ...] = ()
    selected: bool = False
    role: RoleName = "policy"

    @property
    def needs(self) -> frozenset[str]:
        return LOGP

    @property
    def reads(self) -> frozenset[str]:
        return frozenset().union(*(s.reads for s in self.select))

    @property
    def current(self) -> frozenset[str]:
        return frozenset().union(*(s.current for s in self.select))

    def mask(self, batch: Batch) -> Tensor:
        """[N] bool: the tokens this term is about, before filters and selectors."""
        return batch["action"]

    def drops(self, batch: Batch) -> Dropped:
        """Further masks of this term only."""
        return []

    def plan(
        self,
        batch: Batch,
        dropped: Dropped,
        selectors: tuple[TokenSelector, ...],
        now: Forward | None,
    ) -> tuple[Batch, float]:
        base = self.mask(batch)
        masks = [*dropped, *self.drops(batch)]
        left = base  # what filters and rejections leave is what selectors choose from
        for mask, _ in masks:
            left = left & mask
        for selector in (*self.select, *(selectors if self.selected else ())):
            masks.append((base & ~left | selector(batch, left, now), selector.rule))
        counted, denominated = base, base
        for mask, rule in masks:
            counted = counted & mask
            denominated = denominated & mask if rule == "kept" else denominated
        weights, denominator = self.aggregation(batch, counted, denominated)
        return batch.with_tokens(**{self.column: weights}), denominator

    @property
    def column(self) -> str:
        return f"weight/{self.name}"

    def numerator(self, batch: Batch, forward: Forward) -> Tensor:
        weight = batch[self.column]
        loss = self.per_token(batch, forward)
        return (weight * torch.where(weight != 0, loss, torch.zeros_like(loss))).sum()

    def per_token(self, batch: Batch, forward: Forward) -> Tensor:
        """[N] the loss of each token; what it says where the weight is 0 does not matter."""
        raise NotImplementedError

    def diagnostics(self, batch: Batch, forward: Forward) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True)
class PolicyTerm(TokenTerm):
    """The policy gradient, at most once weighted by an off-policy correction.

    `kind`: see `retool.objectives.surrogate`; `plain` is -A log π. `cap`: CISPO's absolute bound of the ratio, in the
    place of 1 - `clip_low` and 1 + `clip_high`.
    """

    name: str = "policy"
    kind: Literal["clip", "cispo", "sapo", "plain"] = "clip"
    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    dual_clip: float | None = None
    cap: float | None = None
    tau_pos: float = 1.0
    tau_neg: float = 1.05
    ratio: Literal["token", "sequence"] = "token"
    selected: bool = True
    rejection: Rule = "all_act"

    @property
    def reads(self) -> frozenset[str]:
        return super().reads | ({"advantage"} if self.kind == "plain" else {"advantage", "logp_old"})

    def drops(self, batch: Batch) -> Dropped:
        kept = batch.get("off_policy_kept")
        return [] if kept is None else [(kept, self.rejection)]

    def ratios(self, batch: Batch, logp: Tensor) -> Tensor:
        old = old_logp(batch, logp)
        if self.ratio == "token":
            return token_ratio(logp, old, batch["action"])
        return sequence_ratio(logp, old, batch["action"], batch)

    def per_token(self, batch: Batch, forward: Forward) -> Tensor:
        loss = self.surrogate(batch, forward.need("logp"))
        weight = batch.get("off_policy_weight")
        return loss if weight is None else loss * weight

    def surrogate(self, batch: Batch, logp: Tensor) -> Tensor:
        """[N] the loss before any correction: what a subclass replaces."""
        advantage = batch["advantage"]
        if self.kind == "plain":
            return -advantage * logp
        ratio = self.ratios(batch, logp)
        if self.kind == "sapo":
            return sapo_surrogate(ratio, advantage, self.tau_pos, self.tau_neg)
        if self.kind == "cispo":
            return cispo_surrogate(logp, ratio, advantage, *self.bounds)
        return clip_surrogate(ratio, advantage, self.clip_low, self.clip_high, self.dual_clip)

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """Smallest and largest ratio of CISPO."""
        if self.cap is not None:
            return None, self.cap
        low = None if self.clip_low is None else max(0.0, 1 - self.clip_low)
        return low, None if self.clip_high is None else 1 + self.clip_high

    def diagnostics(self, batch: Batch, forward: Forward) -> dict[str, Tensor]:
        logp = forward.need("logp").detach()
        action, advantage = batch["action"], batch["advantage"]
        gap = torch.where(action, old_logp(batch, logp) - logp, torch.zeros_like(logp))
        if self.kind in ("plain", "sapo"):
            return {"approx_kl": gap.sum()}
        ratio = self.ratios(batch, logp)
        low, high = clip_fractions(ratio, advantage, self.clip_low, self.clip_high)
        if self.kind == "cispo":
            least, most = self.bounds
            low, high = ratio < (0.0 if least is None else least), ratio > (torch.inf if most is None else most)
        return {"clip_low": (low & action).sum(), "clip_high": (high & action).sum(), "approx_kl": gap.sum()}


@dataclass(frozen=True)
class KlTerm(TokenTerm):
    """KL to another policy whose log-probs stand in the column `against`, added to the loss."""

    name: str = "kl"
    estimator: Estimator = "k3"
    against: str = "logp_ref"

    @property
    def reads(self) -> frozenset[str]:
        return super().reads | {self.against}

    def per_token(self, batch: Batch, forward: Forward) -> Tensor:
        logp, action = forward.need("logp"), batch["action"]
        other = old_logp(batch, logp) if self.against == "logp_old" else batch[self.against]
        return kl_estimate(logp, torch.where(action, other, logp.detach()), self.estimator)


@dataclass(frozen=True)
class EntropyTerm(TokenTerm):
    """Minus the entropy: a positive coefficient rewards entropy."""

    name: str = "entropy"

    @property
    def needs(self) -> frozenset[str]:
        return ENTROPY

    def per_token(self, batch: Batch, forward: Forward) -> Tensor:
        return -forward.need("entropy")


@dataclass(frozen=True)
class NllTerm(TokenTerm):
    """Imitation: -log π. `positives`: of right answers only, in numerator and denominator (VAPO)."""

    name: str = "nll"
    positives: bool = False

    @property
    def reads(self) -> frozenset[str]:
        return super().reads | ({"accuracy"} if self.positives else set())

    def mask(self, batch: Batch) -> Tensor:
        return batch["action"] & (batch.spread("accuracy") > 0.5) if self.positives else batch["action"]

    def per_token(self, batch: Batch, forward: Forward) -> Tensor:
        return -forward.need("logp")


@dataclass(frozen=True)
class ValueTerm(TokenTerm):
    """The critic's clipped regression to `target` (returns in the critic's own units) from its old output `value`."""

    name: str = "value"
    clip: float | None = 0.2
    role: RoleName = "critic"

    @property
    def needs(self) -> frozenset[str]:
        return VALUE

    @property
    def reads(self) -> frozenset[str]:
        return super().reads | {"value", "target"}

    def per_token(self, batch: Batch, forward: Forward) -> Tensor:
        return value_loss(forward.need("value"), batch["value"], batch["target"], self.clip)


@dataclass(frozen=True)
class PairTerm:
    """DPO on pairs (2305.18290): the sample of higher score is chosen. Log-probs are *summed* over action tokens.

    -(1-s) log σ(z) - s log σ(-z) with z = β (Δ_chosen - Δ_rejected), or IPO's (z/β - 1/(2β))². A pair with a member
    that is not `in_loss` counts in neither numerator nor denominator.
    """

    name: str = "pair"
    coef: float = 1.0
    beta: float = 0.1
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: float = 0.0
    role: RoleName = "policy"
    needs: frozenset[str] = LOGP
    reads: frozenset[str] = frozenset({"pair", "score", "logp_ref", "in_loss"})
    current: frozenset[str] = frozenset()

    def plan(
        self,
        batch: Batch,
        dropped: Dropped,
        selectors: tuple[TokenSelector, ...],
        now: Forward | None,
    ) -> tuple[Batch, float]:
        chosen, rejected = self._match(batch)
        both = (batch["in_loss"][chosen] & batch["in_loss"][rejected]).to(batch["score"].dtype)
        weight = torch.zeros(len(batch), dtype=both.dtype).index_put((chosen,), both)
        return batch.with_samples(**{f"weight/{self.name}": weight}), float(both.sum())

    def _match(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """([P] rows of chosen, [P] rows of rejected)."""
        order = torch.argsort(batch["score"], stable=True)
        order = order[torch.argsort(batch["pair"][order], stable=True)]
        if len(order) % 2:
            raise ObjectiveError("a pair was split; packing must keep atoms whole")
        rejected, chosen = order[0::2], order[1::2]
        if bool((batch["pair"][chosen] != batch["pair"][rejected]).any()):
            raise ObjectiveError("a pair was split; packing must keep atoms whole")
        if bool((batch["score"][chosen] <= batch["score"][rejected]).any()):
            raise ObjectiveError("both samples of a pair have the same score; drop such pairs")
        return chosen, rejected

    def margins(self, batch: Batch, logp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """([P] rows of chosen, [P] Δ_chosen, [P] Δ_rejected), Δ = Σ logp - logp_ref over action tokens."""
        chosen, rejected = self._match(batch)
        gap = torch.where(batch["action"], logp - batch["logp_ref"], torch.zeros_like(logp))
        total = batch.sum(gap)
        return chosen, total[chosen], total[rejected]

    def numerator(self, batch: Batch, forward: Forward) -> Tensor:
        chosen, up, down = self.margins(batch, forward.need("logp"))
        z = self.beta * (up - down)
        if self.loss == "ipo":
            loss = (z / self.beta - 1 / (2 * self.beta)).square()
        else:
            loss = -(1 - self.label_smoothing) * F.logsigmoid(z) - self.label_smoothing * F.logsigmoid(-z)
        return (batch[f"weight/{self.name}"][chosen] * loss).sum()

    def diagnostics(self, batch: Batch, forward: Forward) -> dict[str, Tensor]:
        return {}
