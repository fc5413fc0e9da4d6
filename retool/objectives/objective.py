"""An algorithm as a composition: the parts, and the four scopes in which the learner calls them.

1. `filter(batch)`: before scoring, on raw accuracy.
2. `prepare(batch, state)`: once a rollout: off-policy weights, KL in the reward, advantages.
3. `finalize(mini_batch, state)`: once an optimiser step: selectors, token weights, denominators.
4. `loss(micro_batch, forward)`: numerators only. Micro-batches, packing and ranks cannot change Σ numerator /
   denominator, because every weight and denominator was fixed in scope 3.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from retool.objectives.aggregate import Rule
from retool.objectives.base import (
    SCORES,
    AdvantageEstimator,
    Aside,
    Critic,
    Early,
    GroupFilter,
    KlPenalty,
    ObjectiveState,
    OffPolicy,
    Reference,
    Remembering,
    Structure,
    Term,
    TokenSelector,
)
from retool.objectives.batch import Batch, Forward
from retool.objectives.estimators import NoAdvantage
from retool.objectives.filters import AccuracyFilter
from retool.objectives.kl import adapt_beta, kl_estimate
from retool.objectives.off_policy import importance
from retool.objectives.value import explained_variance, moments, update_moments


@dataclass(frozen=True)
class Finalized:
    """A mini-batch with its weight columns; `denominators` and `coefs` by term name."""

    batch: Batch
    denominators: dict[str, float]
    coefs: dict[str, float]

    def scale(self, term: str) -> float:
        """coef / denominator; 0 when nothing was left to average over."""
        denominator = self.denominators[term]
        return self.coefs[term] / denominator if denominator > 0 else 0.0


@dataclass(frozen=True)
class Objective:
    """See the module. `train_on`: `sampled` tokens, or also `demo` tokens (imitation). `temperature`: at which
    log-probs are taken. `filter_rule`: whether samples out of the loss leave the denominators. `reward_clip`: bound of
    |score|. `aside`: a term on demonstrations beside the rollout (PTX)."""

    name: str
    advantage: AdvantageEstimator
    terms: tuple[Term, ...]
    structure: Structure = field(default_factory=Structure)
    filter: GroupFilter = field(default_factory=AccuracyFilter)
    select: tuple[TokenSelector, ...] = ()
    off_policy: OffPolicy = field(default_factory=OffPolicy)
    kl: KlPenalty = field(default_factory=KlPenalty)
    reference: Reference | None = None
    critic: Critic | None = None
    filter_rule: Rule = "kept"
    train_on: Literal["sampled", "demo"] = "sampled"
    temperature: float = 1.0
    reward_clip: float | None = None
    aside: Aside | None = None

    @property
    def beside(self) -> Objective | None:
        """The objective of the term on demonstrations, which is imitation and nothing else."""
        if self.aside is None:
            return None
        return Objective(self.aside.term.name, NoAdvantage(), (self.aside.term,), train_on="demo")

    @property
    def scores(self) -> frozenset[str]:
        """Columns that the score pass must compute."""
        reads = self.advantage.reads.union(*(t.reads for t in self.terms), *(s.reads for s in self.select))
        if self.kl.place == "reward" or (self.kl.place == "loss" and self.kl.target is not None):
            reads |= {"logp_old", "logp_ref"}
        if self.off_policy.old == "rollout" or (self.off_policy.old == "detached" and not self.early_old):
            reads -= {"logp_old"}
        elif self.early_old:
            reads |= {"logp_old"}
        return reads & frozenset(SCORES)

    @property
    def early_old(self) -> bool:
        """Whether something before the loss reads the old log-probs, so that they cannot come from the loss pass."""
        every = (*self.select, *(s for t in self.terms for s in getattr(t, "select", ())))
        selectors = any("logp_old" in s.reads and not s.current for s in every)
        return self.off_policy.active or self.kl.place == "reward" or self.kl.target is not None or selectors

    @property
    def current(self) -> frozenset[str]:
        """Which of logp, entropy `finalize` needs of the current weights."""
        return frozenset().union(*(t.current for t in self.terms), *(s.current for s in self.select))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(t.needs for t in self.terms))

    def initial_state(self) -> ObjectiveState:
        return ObjectiveState(beta=self.kl.beta)

    def prepare(self, batch: Batch, state: ObjectiveState) -> tuple[Batch, ObjectiveState, dict[str, float]]:
        """Adds `advantage` (and `target`, off-policy columns, ...) to a scored rollout. Detached throughout."""
        metrics: dict[str, float] = {}
        with torch.no_grad():
            if self.reward_clip is not None:
                batch = batch.with_samples(score=batch["score"].clamp(-self.reward_clip, self.reward_clip))
            if self.off_policy.old == "rollout":
                batch = batch.with_tokens(logp_old=batch["logp_rollout"])
            if self.off_policy.active:
                batch = self._correct(batch, metrics)
            batch, state = self._leash(batch, state, metrics)
            if self.critic is not None:
                mean, std = moments(state, self.critic)
                batch = batch.with_tokens(critic_value=batch["value"] * std + mean)
                if "bootstrap" in batch:
                    batch = batch.with_samples(critic_bootstrap=batch["bootstrap"] * std + mean)
            if isinstance(self.advantage, Remembering):
                batch, state = self.advantage.estimate(batch, state)
            else:
                batch = self.advantage(batch)
            for selector in self.select:
                batch = selector.prepare(batch) if isinstance(selector, Early) else batch
            if self.critic is not None:
                batch, state = self._targets(batch, state, self.critic, metrics)
            if "advantage" in batch and bool(batch["action"].any()):
                a = batch["advantage"][batch["action"]]
                metrics |= {"advantage/mean": float(a.mean()), "advantage/std": float(a.std(correction=0))}
        return batch, state, metrics

    def _correct(self, batch: Batch, metrics: dict[str, float]) -> Batch:
        weight, kept = importance(batch, self.off_policy)
        action = batch["action"]
        if bool(action.any()):
            metrics["off_policy/weight"] = float(weight[action].mean())
            metrics["off_policy/kept"] = float(kept[action].double().mean())
        return batch.with_tokens(off_policy_weight=weight, off_policy_kept=kept)

    def _leash(self, batch: Batch, state: ObjectiveState, metrics: dict[str, float]) -> tuple[Batch, ObjectiveState]:
        """KL in the reward with the current β, then the next β from this rollout's KL."""
        if "logp_ref" not in batch or "logp_old" not in batch:
            return batch, state
        action = batch["action"]
        zero = torch.zeros_like(batch["logp_old"])
        k1 = torch.where(action, batch["logp_old"] - batch["logp_ref"], zero)
        per_sample = float(batch.sum(k1).mean()) if len(batch) else 0.0
        metrics |= {"kl/reference": float(k1.sum() / action.sum().clamp(min=1)), "kl/beta": state.beta}
        if self.kl.place == "reward":
            ref = torch.where(action, batch["logp_ref"], zero)
            old = torch.where(action, batch["logp_old"], zero)
            penalty = -state.beta * kl_estimate(old, ref, self.kl.estimator)
            batch = batch.with_tokens(kl_reward=torch.where(action, penalty, zero))
        if self.kl.place != "none" and self.kl.target is not None:
            beta = adapt_beta(state.beta, per_sample, len(batch), self.kl.target, self.kl.horizon)
            state = replace(state, beta=beta)
        return batch, state

    def _targets(
        self, batch: Batch, state: ObjectiveState, critic: Critic, metrics: dict[str, float]
    ) -> tuple[Batch, ObjectiveState]:
        """The critic's regression target in its own units, after the moments have seen this rollout."""
        action, returns = batch["action"], batch["return"]
        metrics["value/explained_variance"] = explained_variance(returns[action], batch["critic_value"][action])
        state = update_moments(state, critic, returns[action])
        mean, std = moments(state, critic)
        return batch.with_tokens(target=torch.where(action, (returns - mean) / std, torch.zeros_like(returns))), state

    def finalize(
        self, batch: Batch, state: ObjectiveState, now: Forward | None = None, critic_only: bool = False
    ) -> Finalized:
        """Weights and denominators of one optimiser step's whole mini-batch. `now`: current log-probs without
        gradient, given when `current`. `critic_only`: critic warm-up, the policy's terms are left out."""
        dropped = [(batch.spread("in_loss"), self.filter_rule)]
        denominators, coefs = {}, {}
        with torch.no_grad():
            for term in self.terms:
                if critic_only and term.role == "policy":
                    continue
                batch, denominators[term.name] = term.plan(batch, dropped, self.select, now)
                in_loss_kl = term.name == "kl" and self.kl.place == "loss"
                coefs[term.name] = state.beta if in_loss_kl else term.coef
        return Finalized(batch, denominators, coefs)

    def loss(self, batch: Batch, forward: Forward, names: frozenset[str] | None = None) -> dict[str, Tensor]:
        """{term: numerator} of a micro-batch taken from a finalized mini-batch; `names` limits it to some terms."""
        return {t.name: t.numerator(batch, forward) for t in self.terms if names is None or t.name in names}

    def diagnostics(self, batch: Batch, forward: Forward, names: frozenset[str]) -> dict[str, Tensor]:
        """Sums over a micro-batch's tokens, to be divided by the mini-batch's action tokens."""
        out: dict[str, Tensor] = {}
        for term in self.terms:
            if term.name in names:
                out |= {f"{term.name}/{key}": value for key, value in term.diagnostics(batch, forward).items()}
        return out
