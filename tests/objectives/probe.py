"""The probe batch: one rollout on which presets must differ, and what the policy says about it at two updates.

Log-probs of rollout, old and current all differ; lengths differ; groups are mixed, all wrong and all right; there are
tool spans, truncated and void members. Every action token has a number, `token`, by which gradients are compared
whatever was dropped, inserted or moved.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from retool.config import Recipe
from retool.objectives import Batch, Forward, Objective, ObjectiveState, build_objective, preset_fragment
from tests.objectives.build_batches import F64, f64

ACCURACY = ([1, 0, 0, 1, 0, 0], [1, 1, 0, 1, 0, 1], [0] * 6, [1] * 6)
OUTPUTS = ("logp", "entropy", "value")
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Probe:
    """`batch`: the scored rollout. `currents`: network outputs at each of two updates, [T] by token number."""

    batch: Batch
    currents: tuple[Outputs, Outputs]


def probe(tool: int = 0, pad: int = 0) -> Probe:
    """The probe batch, its tool spans longer by `tool` tokens and every row by `pad` masked ones at the end. What
    stands at masked tokens is not a number, in the columns as in the outputs."""
    rng = random.Random(7)
    columns: dict[str, list[float]] = {}
    offsets, samples, count = [0], [], 0

    def put(**values: float) -> None:
        for name, value in values.items():
            columns.setdefault(name, []).append(value)

    for group, answers in enumerate(ACCURACY):
        for i, right in enumerate(answers):
            turns, shift, fresh = rng.randint(1, 3), rng.uniform(-0.6, 0.9), rng.random() < 0.4
            failed = [rng.random() < 0.5 for _ in range(turns - 1)]
            for turn in range(turns):
                n = rng.randint(1, 5)
                for k in range(n):
                    sampled = -rng.expovariate(1.0) - 0.01
                    old = sampled + (5e-4 * (-1) ** k if fresh else min(rng.uniform(-1.2, 1.9), -0.9 * sampled))
                    last = k == n - 1
                    own = (0.1 * sum(failed) if turn == turns - 1 else -0.1 * failed[turn]) if last else 0.0
                    put(token=count, action=1, turn=turn, logp_rollout=sampled, logp_old=old, turn_reward=own)
                    put(logp_ref=old + rng.uniform(-0.5, 0.5), entropy=rng.uniform(0, 2), value=rng.uniform(-1, 1))
                    put(current=min(old - shift + rng.uniform(-0.4, 0.4), 0.8 * old))
                    count += 1
                for _ in range(rng.randint(1, 3) + tool if turn < turns - 1 else pad):
                    put(token=-1, action=0, turn=turn, logp_rollout=0.0, logp_old=torch.nan, turn_reward=0.0)
                    put(logp_ref=torch.nan, entropy=torch.nan, value=torch.nan, current=torch.nan)
            offsets.append(len(columns["token"]))
            samples.append(
                {
                    "group": group,
                    "key": rng.getrandbits(62),
                    "problem": 1000 + group,
                    "accuracy": float(right),
                    "score": 2.0 * right - 1,
                    "tool_calls": turns - 1,
                    "tool_error_rate": sum(failed) / max(1, turns - 1),
                    "format_penalty": 0.5 * (rng.random() < 0.3),
                    "void": i == 1,
                    "truncated": i == 2,
                    "bootstrap": rng.uniform(-1, 1),
                }
            )
    now = f64([x for x, a in zip(columns.pop("current"), columns["action"]) if a])
    tokens = {name: f64(values) for name, values in columns.items()}
    tokens |= {name: tokens[name].to(torch.int64) for name in ("token", "turn")}
    tokens["action"] = tokens["action"] > 0
    tokens["kind"], tokens["segment"] = torch.zeros_like(tokens["turn"]), torch.zeros_like(tokens["turn"])
    batch = Batch(torch.tensor(offsets), tokens, _sample_columns(samples))
    return Probe(batch, (_outputs(now, 0), _outputs(now, 1)))


def _sample_columns(samples: list[dict[str, float]]) -> dict[str, Tensor]:
    n = len(samples)
    out = {name: torch.tensor([s[name] for s in samples]) for name in samples[0]}
    out |= {name: column.to(F64) for name, column in out.items() if column.is_floating_point()}
    minus = torch.full((n,), -1)
    yes = torch.ones(n, dtype=torch.bool)
    pairs = torch.arange(n) // 2
    return {"in_loss": yes, "in_baseline": yes, "parent": minus, "cluster": minus, "pair": pairs, **out}


def _outputs(now: Tensor, update: int) -> Outputs:
    """Outputs of the networks, which move from one update to the next."""
    wave = torch.sin(torch.arange(len(now), dtype=F64) * (1.7 + update) + 1)
    return {"logp": now * (1 + 0.2 * update * wave), "entropy": 1 + wave, "value": 0.8 * torch.cos(wave * 5 + update)}


def built(name: str) -> Objective:
    """A preset's objective, several optimiser steps a rollout."""
    fragment = preset_fragment(name)
    fragment.setdefault("learner", {})["epochs"] = 2
    return build_objective(Recipe(**fragment))


def outputs_of(batch: Batch, outputs: Outputs) -> Forward:
    """Outputs by token number as those of a batch; not a number where a token has none."""
    token = batch["token"]
    poison = torch.full((1,), torch.nan, dtype=F64)
    return Forward(**{name: torch.cat([outputs[name], poison])[token] for name in OUTPUTS})


@dataclass(frozen=True)
class Update:
    """One optimiser step's loss and its gradient with respect to every output, [T] by token number."""

    loss: float
    grad: Outputs


Split = Callable[[Batch], Sequence[Sequence[int]]]


def together(batch: Batch) -> list[list[int]]:
    return [list(range(len(batch)))]


def updates(objective: Objective, given: Probe, split: Split = together) -> list[Update]:
    """Runs the four scopes on a probe: filter, prepare, and the two updates, each cut into micro-batches by `split`."""
    batch, _ = objective.filter(given.batch)
    unread = {"logp_old", "logp_ref", "value", "entropy", "bootstrap"} - objective.scores
    if objective.off_policy.old == "rollout":
        unread.add("logp_old")
    keep = {k: v for k, v in batch.tokens.items() if k not in unread}
    batch = Batch(batch.offsets, keep, {k: v for k, v in batch.samples.items() if k not in unread})
    batch, state, _ = objective.prepare(batch, objective.initial_state())
    return [one_update(objective, batch, state, outputs, split) for outputs in given.currents]


def one_update(objective: Objective, batch: Batch, state: ObjectiveState, outputs: Outputs, split: Split) -> Update:
    leaves = {name: column.clone().requires_grad_() for name, column in outputs.items()}
    with torch.no_grad():
        now = outputs_of(batch, outputs) if objective.current else None
    final = objective.finalize(batch, state, now)
    total = torch.zeros((), dtype=F64)
    for rows in split(batch):
        piece = final.batch.take(rows)
        for name, numerator in objective.loss(piece, outputs_of(piece, leaves)).items():
            total = total + final.scale(name) * numerator
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    filled = {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(leaves, grads)}
    return Update(float(total.detach()), filled)


@contextmanager
def held() -> Iterator[Callable[[], None]]:
    """What is detached in the first call of a function keeps its value in later ones; call the yielded function before
    each of these."""
    values: list[Tensor] = []
    at = [-1]
    original = Tensor.detach

    def detach(self: Tensor) -> Tensor:
        if at[0] < 0:
            values.append(original(self).clone())
            return values[-1]
        at[0] += 1
        return values[at[0] - 1]

    def again() -> None:
        at[0] = 0

    Tensor.detach = detach  # type: ignore[method-assign]
    try:
        yield again
    finally:
        Tensor.detach = original  # type: ignore[method-assign]
