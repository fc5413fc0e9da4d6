"""Several objectives on the same stored rollouts of a run: where do their gradients point, and which tokens count?

    retool compare runs/mine --objectives grpo,dapo,vapo [--steps 40,41] [--out FOLDER]

Every objective gets the same weights (a checkpoint of the run), the same trajectories and the same micro-batches. It
makes two passes over all of them as one mini-batch: the gradient of the first is what is compared; then one real
optimiser step is made, and the second pass shows what is clipped when ratios are no longer 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from retool.config import Recipe
from retool.errors import UserError
from retool.learner import Learner
from retool.learner import checkpoint as ckpt
from retool.objectives import (
    Batch,
    Finalized,
    Forward,
    MissingColumn,
    Objective,
    ObjectiveState,
    build_objective,
    preset_fragment,
)
from retool.recipe import merge, resolve
from retool.records import Group, TrainSample
from retool.rollout.dynamic import mixed
from retool.rollout.groups import to_samples
from retool.stored_run import StoredRun
from retool.transcript import KINDS

AFTER_TOOL = 8
"""Action tokens behind an observation that count as `after-tool`."""
TOKEN_KINDS = ("text", "code", "after-tool")
COORDINATES = 1 << 24
"""Larger gradients are compared on so many coordinates, evenly spread; norms are always exact."""
SWAPPED = ("objective",)


class NotComparable(UserError):
    """This objective cannot be computed on this run's rollouts; the message says why."""


@dataclass
class Tape:
    """What one objective did. Index 0 is the first pass, index 1 the one after a real step."""

    gradient: list[Tensor] = field(default_factory=list)
    norm: list[float] = field(default_factory=list)
    weight: list[list[Tensor]] = field(default_factory=lambda: [[]])
    kind: list[list[Tensor]] = field(default_factory=lambda: [[]])
    clipped: list[float] = field(default_factory=lambda: [0.0])
    tokens: list[float] = field(default_factory=lambda: [0.0])
    final: Finalized | None = None

    def next(self) -> None:
        """A pass is over."""
        self.weight.append([])
        self.kind.append([])
        self.clipped.append(0.0)
        self.tokens.append(0.0)


@dataclass(frozen=True)
class Recorded(Objective):
    """An objective that notes, for each action token, the derivative of the loss by its log-probability; the KL to the
    reference, which pulls at every token alike, is left out of that."""

    tape: Tape = field(default_factory=Tape)

    def finalize(
        self, batch: Batch, state: ObjectiveState, now: Forward | None = None, critic_only: bool = False
    ) -> Finalized:
        final = super().finalize(batch, state, now, critic_only)
        self.tape.final = final
        return final

    def loss(self, batch: Batch, forward: Forward, names: frozenset[str] | None = None) -> dict[str, Tensor]:
        numerators = super().loss(batch, forward, names)
        tape, logp = self.tape, forward.logp
        if logp is not None and logp.requires_grad and tape.final is not None:
            zero = logp.sum() * 0.0
            total = sum((tape.final.scale(n) * x for n, x in numerators.items() if n != "kl"), start=zero)
            action = batch["action"]
            (gradient,) = torch.autograd.grad(total, logp, retain_graph=True)
            tape.weight[-1].append(gradient[action].cpu().double())
            tape.kind[-1].append(token_kinds(batch)[action.cpu()])
            tape.tokens[-1] += float(action.sum())
        return numerators

    def diagnostics(self, batch: Batch, forward: Forward, names: frozenset[str]) -> dict[str, Tensor]:
        out = super().diagnostics(batch, forward, names)
        clips = [v for k, v in out.items() if k.rpartition("/")[2] in ("clip_low", "clip_high")]
        self.tape.clipped[-1] += float(sum(clips)) if clips else 0.0
        return out


@dataclass(frozen=True)
class Row:
    """One objective's figures. `effective`: action tokens that a term other than the KL to the reference pulls at.
    `spread`: (Σ|w|)²/Σw², the number of equally heavy tokens that would weigh as much. `shares`: of Σ|w| by token kind.
    `clipped`, `effective_after`: after one real step; None where the objective makes only one. `notes`: what had to be
    left out or mapped."""

    name: str
    family: str
    norm: float
    tokens: int
    effective: int
    spread: float
    shares: dict[str, float]
    clipped: float | None
    effective_after: int | None
    max_logprob_gap: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """`cosine[i][j]`: of the first gradients of rows i and j; nan where one of them is 0. `refused`: name -> why.
    `age`: steps between the oldest rollouts and the weights; negative: the weights are older than the rollouts."""

    run: str
    steps: tuple[int, ...]
    weights: str
    rows: tuple[Row, ...]
    cosine: tuple[tuple[float, ...], ...]
    refused: dict[str, str]
    trajectories: int
    age: int = 0


def compare(run: StoredRun, names: Sequence[str], steps: Sequence[int] | None = None) -> Comparison:
    """Raises `UserError` for unknown objectives, unknown steps, and a run without usable rollouts or weights."""
    for name in names:
        preset_fragment(name)  # unknown names before anything expensive
    chosen = run.choose_steps(steps)
    groups = run.groups(chosen)
    rows: list[Row] = []
    gradients: list[Tensor] = []
    refused: dict[str, str] = {}
    for name in dict.fromkeys(names):
        try:
            row, gradient = measure(run, name, groups)
        except (UserError, MissingColumn, ckpt.CheckpointError, ValueError) as error:
            refused[name] = " ".join(str(error).split())
            continue
        rows.append(row)
        gradients.append(gradient)
    table = tuple(tuple(cosine(a, b) for b in gradients) for a in gradients)
    count = sum(len(g.usable) for g in groups)
    age = run.checkpoint - min(chosen)
    return Comparison(str(run.path), tuple(chosen), str(run.weights), tuple(rows), table, refused, count, age)


def measure(run: StoredRun, name: str, groups: Sequence[Group]) -> tuple[Row, Tensor]:
    """One objective's figures and its gradient (at most `COORDINATES` numbers). Raises what says why it cannot be."""
    notes: list[str] = []
    recipe = objective_recipe(run.recipe, name)
    objective = check(run, recipe, build_objective(recipe))
    samples = samples_for(run.recipe, recipe, objective, groups, notes)
    model, tokenizer = run.load_policy()
    tape = Tape()
    recorded = Recorded(**{f.name: getattr(objective, f.name) for f in fields(objective)}, tape=tape)
    learner = Learner.create(recipe, recorded, model, tokenizer)
    run.load_roles(learner)
    record_steps(learner, tape)
    metrics = learner.step(samples)
    if not tape.gradient:
        raise NotComparable("nothing of these rollouts is left to learn from: its filter dropped every sample")
    weight, kind = torch.cat(tape.weight[0]), torch.cat(tape.kind[0])
    total = float(weight.abs().sum())
    two = len(tape.norm) > 1
    after = torch.cat(tape.weight[1]) if two and tape.weight[1] else torch.zeros(0)
    row = Row(
        name=name,
        family=run.family(name),
        norm=tape.norm[0],
        tokens=int(tape.tokens[0]),
        effective=int((weight != 0).sum()),
        spread=total * total / float(weight.square().sum()) if total > 0 else 0.0,
        shares={
            k: float(weight[kind == i].abs().sum()) / total if total > 0 else 0.0 for i, k in enumerate(TOKEN_KINDS)
        },
        clipped=tape.clipped[1] / max(tape.tokens[1], 1.0) if two else None,
        effective_after=int((after != 0).sum()) if two else None,
        max_logprob_gap=float(metrics.get("max_logprob_gap", math.nan)),
        notes=tuple(notes),
    )
    return row, tape.gradient[0]


def objective_recipe(recipe: Recipe, name: str) -> Recipe:
    """The run's recipe with another objective. What the preset says about sampling and learning rates gives way to the
    run; two passes over everything, one where old log-probs are those of the first update."""
    raw = recipe.model_dump(mode="json", exclude=set(SWAPPED))
    raw["rollout"] |= {"dynamic": {"kind": "none"}, "priority": "none"}
    raw["learner"] |= {"updates": 1, "epochs": 2, "warmup_steps": 0, "shard": "none", "schedule": "constant"}
    single = preset_fragment(name).get("objective", {}).get("off_policy", {}).get("old") == "detached"
    if single:
        raw["learner"]["epochs"] = 1
    return resolve(merge(raw, {"objective": {"preset": name}}), where=name)


def check(run: StoredRun, recipe: Recipe, objective: Objective) -> Objective:
    """The objective without its warm-up. Raises `NotComparable` for what the run's rollouts or checkpoint lack."""
    if objective.train_on == "demo":
        raise NotComparable("it imitates demonstrations; rollouts hold none")
    if objective.structure.kind not in ("flat", "group"):
        raise NotComparable(f"it needs {objective.structure.kind}; the run's trajectories are flat groups")
    if getattr(objective, "aside", None) is not None:
        raise NotComparable("it mixes in demonstrations (objective.ptx); rollouts hold none")
    if objective.critic is not None and not run.has_role("critic"):
        raise NotComparable(f"it needs a critic; {run.weights} holds none")
    if objective.reference is not None and not run.has_reference():
        raise NotComparable(
            f"it needs the reference policy; {run.weights} holds none and the run's first model "
            f"({run.recipe.model.path!r}) is not there any more"
        )
    if objective.critic is not None:
        objective = replace(objective, critic=replace(objective.critic, warmup=0))
    return objective


def samples_for(
    ran: Recipe, recipe: Recipe, objective: Objective, groups: Sequence[Group], notes: list[str]
) -> list[TrainSample]:
    """The stored trajectories as this objective would have been given them: only mixed groups with dynamic sampling,
    scores on the preset's own scale of right and wrong."""
    fragment = preset_fragment(recipe.objective.preset)
    if fragment.get("rollout", {}).get("dynamic", {}).get("kind", "none") != "none":
        kept = [g for g in groups if mixed(g)]
        notes.append(f"dynamic sampling: {len(kept)} of {len(groups)} groups are mixed")
        groups = kept
    samples = to_samples(groups, 2 if objective.structure.kind == "group" else 1)
    if not samples:
        raise NotComparable("no group of these rollouts is left for it")
    wanted = fragment.get("reward", {})
    wrong, right = wanted.get("wrong", ran.reward.wrong), wanted.get("correct", ran.reward.correct)
    if (wrong, right) != (ran.reward.wrong, ran.reward.correct):
        scale = (right - wrong) / (ran.reward.correct - ran.reward.wrong)
        notes.append(f"scores mapped from {ran.reward.wrong:g}/{ran.reward.correct:g} to {wrong:g}/{right:g}")
        samples = [replace(s, score=wrong + (s.score - ran.reward.wrong) * scale) for s in samples]
    others = sorted(set(wanted) - {"wrong", "correct"})
    if others:
        notes.append(f"stored rewards were made without its reward.{', reward.'.join(others)}")
    return samples


def record_steps(learner: Learner, tape: Tape) -> None:
    """Note the policy's gradient before every optimiser step; the steps themselves are real."""
    optimiser = learner.policy.optimiser
    assert optimiser is not None
    real = optimiser.step

    def step(*args: Any) -> float:
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in optimiser.masters]
        if not tape.gradient:
            tape.gradient.append(sampled([p.detach() for p in parts]))
        tape.norm.append(math.sqrt(sum(float(p.double().square().sum()) for p in parts)))
        tape.next()
        return real(*args)

    optimiser.step = step  # type: ignore[method-assign]


def sampled(parts: Sequence[Tensor]) -> Tensor:
    """All numbers of a gradient as one vector, or evenly spread `COORDINATES` of them."""
    total = sum(p.numel() for p in parts)
    stride = max(1, -(-total // COORDINATES))
    out, offset = [], 0
    for p in parts:
        out.append(p.reshape(-1)[(-offset) % stride :: stride].float().cpu())
        offset += p.numel()
    return torch.cat(out)


def cosine(a: Tensor, b: Tensor) -> float:
    """nan when one of them is 0."""
    lengths = float(a.double().norm()) * float(b.double().norm())
    return float(a.double() @ b.double()) / lengths if lengths > 0 else math.nan


def token_kinds(batch: Batch) -> Tensor:
    """[N] index into `TOKEN_KINDS` of each token; those right behind an observation are `after-tool` whatever else they
    are. What it says about tokens that are no action does not matter."""
    kind, action, turn = (batch[name].cpu() for name in ("kind", "action", "turn"))
    code = kind == KINDS.index("code")
    row = batch.row.cpu()
    first = torch.zeros(len(batch), dtype=torch.int64).scatter_reduce(
        0, row, torch.where(action, turn, torch.iinfo(torch.int64).max), "amin", include_self=False
    )
    before = torch.cumsum(action.to(torch.int64), 0) - action.to(torch.int64)
    segment = torch.stack([row, turn], 1)
    _, where = torch.unique(segment, dim=0, return_inverse=True)
    start = torch.full((int(where.max()) + 1 if len(where) else 0,), torch.iinfo(torch.int64).max)
    start = start.scatter_reduce(0, where[action], before[action], "amin")
    behind = (turn > first[row]) & (before - start[where] < AFTER_TOOL)
    return torch.where(behind, 2, torch.where(code, 1, 0))
