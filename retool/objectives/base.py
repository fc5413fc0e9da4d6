"""The parts that an objective is made of, as protocols, and the state that it carries from rollout to rollout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from retool.errors import UserError
from retool.objectives.aggregate import Rule
from retool.objectives.batch import Atom, Batch, Forward

RoleName = Literal["policy", "critic"]
StructureKind = Literal["flat", "group", "chain", "tree", "pairs"]
OldLogp = Literal["recomputed", "rollout", "detached"]
Dropped = list[tuple[Tensor, Rule]]
"""[N] masks of the tokens that stay, each with what its dropped ones mean for the denominator."""
SCORES = ("logp_old", "logp_ref", "value", "entropy", "bootstrap")
"""Columns that only a pass through the networks can give."""


class ObjectiveError(UserError):
    """Choices that do not go together, or data that does not fit them; the message says what to change."""


@dataclass(frozen=True)
class ObjectiveState:
    """Everything an objective remembers. Lives in the checkpoint; immutable, so a step either happened or did not.

    `beta`: current KL coefficient. `value_mean`, `value_square`, `value_weight`: moving moments of the returns and
    the weight they have gathered (the EMA is debiased with it). `extra`: JSON values of what is still to come.
    """

    beta: float = 0.0
    value_mean: float = 0.0
    value_square: float = 0.0
    value_weight: float = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ObjectiveState:
        """Raises `ObjectiveError` on keys that this version does not know."""
        if unknown := set(data) - set(cls.__dataclass_fields__):
            raise ObjectiveError(f"the checkpoint's objective state has unknown keys {sorted(unknown)}")
        return cls(**data)


@dataclass(frozen=True)
class Structure:
    """How samples belong together. `group`: G samples of one problem; `pairs`: two samples, chosen and rejected."""

    kind: StructureKind = "flat"

    def atoms(self, batch: Batch) -> list[Atom]:
        """The rows that must travel together. Raises `ObjectiveError` for a pair that is not two samples."""
        if self.kind != "pairs":
            return [Atom((row,)) for row in range(len(batch))]
        members: dict[int, list[int]] = {}
        for row, pair in enumerate(batch["pair"].tolist()):
            members.setdefault(int(pair), []).append(row)
        for pair, rows in members.items():
            if pair < 0 or len(rows) != 2:
                raise ObjectiveError(f"pair {pair} has {len(rows)} samples; every sample needs a partner")
        return [Atom(tuple(rows)) for rows in members.values()]


class GroupFilter(Protocol):
    """Scope 1, before anything is scored. Reads raw accuracy, never the shaped score."""

    def __call__(self, batch: Batch) -> tuple[Batch, dict[str, float]]:
        """(the samples that stay, some perhaps with `in_loss` off; metrics)."""
        ...


class AdvantageEstimator(Protocol):
    """Once a rollout: rewards and values -> the columns `advantage` and, with a critic, `return`."""

    @property
    def reads(self) -> frozenset[str]: ...

    def __call__(self, batch: Batch) -> Batch: ...


@runtime_checkable
class Remembering(Protocol):
    """An estimator that also learns from rollout to rollout: called in the place of `__call__`, with the state."""

    def estimate(self, batch: Batch, state: ObjectiveState) -> tuple[Batch, ObjectiveState]: ...


class TokenSelector(Protocol):
    """Once an optimiser step: which tokens of the mini-batch a term looks at. Selectors compose by AND.

    `rule`: whether what it drops leaves the denominator (`kept`) or stays in it (`all_act`). `current`: which of
    logp, entropy it needs of the weights as they are now; the learner then makes a pass without gradient first.
    """

    @property
    def rule(self) -> Rule: ...
    @property
    def reads(self) -> frozenset[str]: ...
    @property
    def current(self) -> frozenset[str]: ...

    def __call__(self, batch: Batch, mask: Tensor, current: Forward | None) -> Tensor:
        """[N] bool, a subset of `mask`: the action tokens that filters and rejections have left in the loss."""
        ...


@runtime_checkable
class Early(Protocol):
    """A selector that looks at the whole rollout first."""

    def prepare(self, batch: Batch) -> Batch:
        """The batch with what `__call__` will read."""
        ...


class Term(Protocol):
    """One summand of the loss: coef · numerator / denominator.

    `plan` is called once an optimiser step with the whole mini-batch: it fixes every token's weight and the
    denominator. `numerator` is called for every micro-batch and may only read columns, `weight` and the forward pass.
    """

    @property
    def name(self) -> str: ...
    @property
    def role(self) -> RoleName: ...
    @property
    def coef(self) -> float: ...
    @property
    def needs(self) -> frozenset[str]:
        """Which of logp, entropy, value it differentiates."""
        ...

    @property
    def reads(self) -> frozenset[str]:
        """Columns of the batch."""
        ...

    @property
    def current(self) -> frozenset[str]:
        """Which of logp, entropy `plan` needs of the current weights."""
        ...

    def plan(
        self,
        batch: Batch,
        dropped: Dropped,
        selectors: tuple[TokenSelector, ...],
        now: Forward | None,
    ) -> tuple[Batch, float]:
        """(the batch with this term's weight column, the denominator over the whole mini-batch)."""
        ...

    def numerator(self, batch: Batch, forward: Forward) -> Tensor:
        """Scalar, differentiable in the forward pass."""
        ...

    def diagnostics(self, batch: Batch, forward: Forward) -> dict[str, Tensor]:
        """Sums over tokens for metrics; each is divided by the number of action tokens of the mini-batch."""
        ...


@dataclass(frozen=True)
class OffPolicy:
    """Where the old log-probs come from, and what is done about the gap between engine and learner.

    `old`: `recomputed` by the learner before the first update (A §0.4 decoupled), those of the `rollout` (bypass), or
    `detached` (the current ones without gradient; one optimiser step a rollout). `weight`: none, or truncated
    importance weights of tokens or sequences. `reject`: none, or drop tokens / sequences whose ratio (its geometric
    mean for `geo`) is outside [low, high].
    """

    old: OldLogp = "recomputed"
    weight: Literal["none", "token", "sequence"] = "none"
    cap: float | None = 2.0
    reject: Literal["none", "token", "sequence", "geo"] = "none"
    low: float = 0.5
    high: float = 2.0
    normalise: bool = False
    rule: Rule = "all_act"

    @property
    def active(self) -> bool:
        return self.weight != "none" or self.reject != "none"


@dataclass(frozen=True)
class KlPenalty:
    """The leash to the reference. `place`: in the reward, in the loss, or nowhere. `target`: None = fixed beta."""

    place: Literal["none", "reward", "loss"] = "none"
    estimator: Literal["k1", "k2", "k3", "k3_st", "abs_k1"] = "k1"
    beta: float = 0.0
    target: float | None = None
    horizon: float = 10_000.0


@dataclass(frozen=True)
class Reference:
    """The policy that KL terms and pairs compare with (A §2.1, A.7).

    `frozen`: the weights that training started from. Every `every` moves (optimiser steps of the policy, or rollouts:
    `after`) the others become share · policy + (1 - share) · reference; `hard` has share 1.
    """

    kind: Literal["frozen", "ema", "hard", "mix"] = "frozen"
    share: float = 1.0
    every: int = 1
    after: Literal["update", "rollout"] = "update"


@dataclass(frozen=True)
class Critic:
    """A value network. `normalise`: it predicts returns in units of their moving moments. `warmup`: rollouts in which
    only the critic learns. `lr_factor`: its learning rate as a multiple of the policy's."""

    normalise: bool = False
    decay: float = 0.99995
    eps: float = 1e-5
    warmup: int = 0
    lr_factor: float = 2.0


@dataclass(frozen=True)
class Aside:
    """A term on data of its own beside the rollout's: `batch` demonstrations an optimiser step, own denominator, own
    micro-batches, the same step of the optimiser. Log-probs are taken at temperature 1."""

    term: Term
    batch: int
