"""What holds for every preset: nothing that is masked, padded, split or reordered matters; gradients are right; and no
two presets are the same algorithm unless the table says so."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch

from retool.objectives import PRESETS, Batch
from tests.objectives.build_batches import F64
from tests.objectives.probe import OUTPUTS, Probe, Update, built, held, outputs_of, probe, updates

NAMES = list(PRESETS)


def assert_same(a: list[Update], b: list[Update], tol: float = 1e-9) -> None:
    for one, other in zip(a, b, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=tol)
        for name in OUTPUTS:
            torch.testing.assert_close(one.grad[name], other.grad[name], rtol=0, atol=tol, msg=name)


@cache
def plain(name: str) -> list[Update]:
    return updates(built(name), probe())


@pytest.mark.parametrize("name", NAMES)
def test_the_probe_teaches_something(name: str) -> None:
    for update in plain(name):
        assert max(float(g.abs().max()) for g in update.grad.values()) > 1e-6
        assert all(bool(torch.isfinite(g).all()) for g in update.grad.values())


@pytest.mark.parametrize("name", NAMES)
def test_lengthening_tool_spans_and_padding_change_nothing(name: str) -> None:
    for given in (probe(tool=5), probe(pad=3), probe(tool=1, pad=1)):
        assert_same(updates(built(name), given), plain(name))


def pairs_of(batch: Batch) -> list[list[int]]:
    """Rows that must stay together, in the order of their first member."""
    members: dict[int, list[int]] = {}
    for row, pair in enumerate(batch["pair"].tolist()):
        members.setdefault(pair, []).append(row)
    return list(members.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parts", [2, 5, 24])
def test_micro_batches_change_nothing(name: str, parts: int) -> None:
    whole = built(name).structure.kind == "pairs"

    def split(batch: Batch) -> list[list[int]]:
        units = pairs_of(batch) if whole else [[row] for row in range(len(batch))]
        random.Random(parts).shuffle(units)
        cut = [units[i::parts] for i in range(parts)]
        return [[row for unit in some for row in unit] for some in cut]

    assert_same(updates(built(name), probe(), split), plain(name))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [0, 1])
def test_order_of_groups_and_members_changes_nothing(name: str, seed: int) -> None:
    given = probe()
    groups = [[r for r in range(len(given.batch)) if int(given.batch["group"][r]) == g] for g in range(4)]
    rng = random.Random(seed)
    rng.shuffle(groups)
    for group in groups:
        rng.shuffle(group)
    batch = given.batch.take([row for group in groups for row in group])
    renamed = batch.with_samples(group=torch.tensor([3, 0, 1, 2])[batch["group"]])
    assert_same(updates(built(name), Probe(renamed, given.currents)), plain(name))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_against_finite_differences(name: str) -> None:
    """Along single outputs and random directions, what is detached held at its value."""
    objective, given = built(name), probe()
    batch, _ = objective.filter(given.batch)
    batch, state, _ = objective.prepare(batch, objective.initial_state())
    outputs = given.currents[0]
    final = objective.finalize(batch, state, outputs_of(batch, outputs))

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        parts = objective.loss(final.batch, outputs_of(final.batch, values))
        return sum((final.scale(n) * x for n, x in parts.items()), start=torch.zeros((), dtype=F64))

    leaves = {n: x.clone().requires_grad_() for n, x in outputs.items()}
    generator = torch.Generator().manual_seed(3)
    h = 1e-6
    with held() as again:
        total = loss(leaves)
        grads = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()), allow_unused=True)))
        for which in OUTPUTS:
            n = len(outputs[which])
            directions = [torch.randn(n, generator=generator, dtype=F64) for _ in range(3)]
            directions += [torch.eye(n, dtype=F64)[i] for i in torch.randperm(n, generator=generator)[:12]]
            for direction in directions:
                moved = []
                for sign in (1, -1):
                    again()
                    moved.append(float(loss({**outputs, which: outputs[which] + sign * h * direction})))
                grad = grads[which]
                expected = 0.0 if grad is None else float((grad * direction).sum())
                assert (moved[0] - moved[1]) / (2 * h) == pytest.approx(expected, abs=1e-6)


def gap(a: list[Update], b: list[Update]) -> float:
    """Largest relative difference of two presets' gradients, over both updates and all outputs."""
    most = 0.0
    for one, other in zip(a, b, strict=True):
        for name in OUTPUTS:
            size = max(float(one.grad[name].norm()), float(other.grad[name].norm()))
            if size > 0:
                most = max(most, float((one.grad[name] - other.grad[name]).norm()) / size)
    return most


@pytest.mark.parametrize("name", NAMES)
def test_no_two_presets_are_the_same(name: str) -> None:
    """Equal gradients on the probe only where `same_as` says so, and there really."""
    for other in NAMES[: NAMES.index(name)]:
        named = other in PRESETS[name].same_as or name in PRESETS[other].same_as
        difference = gap(plain(name), plain(other))
        assert (difference < 1e-12) if named else (difference > 1e-6), f"{name} and {other}: {difference}"
    assert set(PRESETS[name].same_as) <= set(NAMES)


def test_the_probe_is_what_it_says() -> None:
    batch, currents = probe().batch, probe().currents
    action = batch["action"]
    assert action.any() and (~action).any() and len(set(batch.lengths.tolist())) > 4
    logs = [batch["logp_rollout"][action], batch["logp_old"][action], *(c["logp"] for c in currents)]
    for i, one in enumerate(logs):
        assert float(one.max()) < 0
        for other in logs[:i]:
            assert float((one - other).abs().min()) > 0
    weight = torch.exp(logs[1] - logs[0])
    assert (weight < 0.5).any() and (weight > 5).any() and ((weight > 2) & (weight < 5)).any()
    assert batch["void"].any() and batch["truncated"].any() and (batch["tool_calls"] > 0).any()
