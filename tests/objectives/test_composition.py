"""The four scopes: gradients against finite differences, filters, state, presets and refused combinations."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retool.config import Recipe
from retool.objectives import (
    PRESETS,
    Batch,
    Forward,
    KlPenalty,
    MissingColumn,
    Objective,
    ObjectiveError,
    ObjectiveState,
    Preset,
    build_objective,
    find_preset,
    preset_fragment,
    validate,
)
from retool.objectives.batch import pad, unpad
from retool.objectives.estimators import GroupRelative, NoAdvantage, Raw
from retool.objectives.filters import AccuracyFilter
from retool.objectives.terms import EntropyTerm, PolicyTerm
from tests.objectives.build_batches import f64, ragged


def recipe(preset: str, **objective: object) -> Recipe:
    fragment = preset_fragment(preset)
    fragment["objective"] |= objective
    return Recipe(**fragment)


def scored(objective: Objective, seed: int = 0) -> tuple[Batch, Forward]:
    """A random scored rollout of three groups, and current outputs that differ from the stored ones."""
    rng = random.Random(seed)
    mask = [[int(rng.random() < 0.7) for _ in range(rng.randint(2, 6))] for _ in range(6)]

    def column(low: float, high: float) -> list[list[float]]:
        return [[rng.uniform(low, high) for _ in row] for row in mask]

    columns = {"logp_rollout": column(-2, -0.1), "entropy": column(0, 2)}
    for name in ("logp_old", "logp_ref", "value"):
        if name in objective.scores:
            columns[name] = column(-2, -0.1)
    batch = ragged(mask, columns, score=[rng.random() for _ in mask], accuracy=[1.0, 0.0] * 3, group=[0, 0, 1, 1, 2, 2])
    n = batch.n_tokens
    logp = f64([rng.uniform(-2, -0.1) for _ in range(n)])
    return batch, Forward(logp=logp, value=f64([rng.uniform(-1, 1) for _ in range(n)]), entropy=logp.square())


@pytest.mark.parametrize("name", PRESETS)
def test_gradients_against_finite_differences(name: str) -> None:
    """Everything detached is a column, so moving only the network's outputs must reproduce the gradient."""
    fragment = preset_fragment(name)
    fragment.setdefault("learner", {})["epochs"] = 2
    objective = build_objective(Recipe(**fragment))
    batch, forward = scored(objective)
    batch, state, _ = objective.prepare(batch, objective.initial_state())
    final = objective.finalize(batch, state)

    def loss(logp: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        parts = objective.loss(final.batch, Forward(logp=logp, value=value))
        return sum((final.scale(n) * x for n, x in parts.items()), start=torch.zeros((), dtype=logp.dtype))

    inputs = [forward.need(n).clone().requires_grad_() for n in ("logp", "value")]
    loss(*inputs).backward()
    h = 1e-6
    for which, tensor in enumerate(inputs):
        grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        for i in range(len(tensor)):
            moved = [[t.detach().clone() for t in inputs] for _ in range(2)]
            moved[0][which][i] += h
            moved[1][which][i] -= h
            slope = (loss(*moved[0]) - loss(*moved[1])) / (2 * h)
            assert float(slope) == pytest.approx(float(grad[i]), abs=1e-6)
        if not bool(batch["action"].all()):
            assert bool((grad[~batch["action"]] == 0).all())


@pytest.mark.parametrize("name", PRESETS)
@given(seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_any_split_adds_up(name: str, seed: int) -> None:
    """Σ numerators of any partition of the samples = numerator of the whole; permuting samples changes nothing."""
    objective = build_objective(recipe(name))
    batch, forward = scored(objective, seed)
    batch, state, _ = objective.prepare(batch, objective.initial_state())
    final = objective.finalize(batch, state)
    rows = list(range(len(batch)))
    random.Random(seed).shuffle(rows)
    cut = seed % 5 + 1
    whole = objective.loss(final.batch, forward)
    parts = []
    for some in (rows[:cut], rows[cut:]):
        index = batch.token_index(torch.tensor(some))
        piece = Forward(*(forward.need(n)[index] for n in ("logp", "entropy", "value")))
        parts.append(objective.loss(final.batch.take(some), piece))
    for term, value in whole.items():
        assert float(parts[0][term] + parts[1][term]) == pytest.approx(float(value), abs=1e-9)


def test_adaptive_beta_moves_once_a_rollout() -> None:
    objective = Objective("x", Raw(), (PolicyTerm(),), kl=KlPenalty("reward", "k1", 0.1, target=6.0, horizon=10_000))
    columns = {"logp_old": [[6.0, 6.0]] * 4, "logp_ref": [[0.0, 0.0]] * 4, "logp_rollout": [[0.0] * 2] * 4}
    batch = ragged([[1, 1]] * 4, columns, score=[1.0] * 4)
    out, state, metrics = objective.prepare(batch, objective.initial_state())
    assert metrics["kl/beta"] == 0.1 and metrics["kl/reference"] == 6.0
    assert state.beta == pytest.approx(0.1 * (1 + 0.2 * 4 / 10_000))
    assert out["kl_reward"].tolist() == pytest.approx([-0.6] * 8)
    assert out["advantage"][:2].tolist() == pytest.approx([1 - 1.2, 1 - 0.6])


def test_filter_reads_accuracy_not_score() -> None:
    """TV-DYN: groups a, b, c, d keep b and d, whatever the shaped scores say."""
    accuracy = [1, 1, 1, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    groups = [g for g in range(4) for _ in range(4)]
    score = [1, 1, 0.5, 0] + [0.0] * 12
    batch = ragged([[1]] * 16, accuracy=[float(a) for a in accuracy], group=groups, score=[float(s) for s in score])
    dropped, metrics = AccuracyFilter("drop")(batch)
    assert dropped["group"].tolist() == [1] * 4 + [3] * 4 and metrics == {"filter/mixed_groups": 0.5}
    masked, _ = AccuracyFilter("mask_loss")(batch)
    assert masked["in_loss"].tolist() == [False] * 4 + [True] * 4 + [False] * 4 + [True] * 4
    assert len(AccuracyFilter("keep")(batch)[0]) == 16


@pytest.mark.parametrize(("rule", "expected"), [("kept", -1.0), ("all_act", -0.5)])
def test_filter_rule_decides_the_denominator(rule: str, expected: float) -> None:
    objective = Objective("x", NoAdvantage(), (PolicyTerm(),), filter_rule=rule)  # type: ignore[arg-type]
    columns = {"advantage": [[1.0, 1.0]] * 2, "logp_old": [[0.0, 0.0]] * 2}
    batch = ragged([[1, 1]] * 2, columns, in_loss=[True, False])
    final = objective.finalize(batch, ObjectiveState())
    parts = objective.loss(final.batch, Forward(logp=torch.zeros(4, dtype=torch.float64)))
    assert float(parts["policy"]) * final.scale("policy") == pytest.approx(expected)


def test_missing_columns_are_named() -> None:
    batch = ragged([[1]])
    with pytest.raises(MissingColumn, match=r"no column 'advantage'.*score"):
        PolicyTerm().per_token(batch, Forward(logp=f64([0])))
    with pytest.raises(ValueError, match="3 rows, expected 1"):
        batch.with_tokens(x=f64([1, 2, 3]))
    with pytest.raises(ValueError, match="both of tokens and of samples"):
        batch.with_tokens(score=f64([1]))


@given(st.lists(st.integers(0, 5), min_size=0, max_size=6), st.data())
@settings(max_examples=50, deadline=None)
def test_ragged_batch(lengths: list[int], data: st.DataObject) -> None:
    batch = ragged(
        [[1] * n for n in lengths], {"x": [[float(10 * i + k) for k in range(n)] for i, n in enumerate(lengths)]}
    )
    rows = data.draw(st.lists(st.integers(0, max(0, len(lengths) - 1)), max_size=8)) if lengths else []
    taken = batch.take(rows)
    assert taken["x"].tolist() == [10.0 * i + k for i in rows for k in range(lengths[i])]
    assert taken.lengths.tolist() == [lengths[i] for i in rows]
    assert batch.sum(batch["x"]).tolist() == [sum(10.0 * i + k for k in range(n)) for i, n in enumerate(lengths)]
    assert torch.equal(unpad(pad(batch["x"], batch.offsets), batch.offsets), batch["x"])
    assert batch.position.tolist() == [k for n in lengths for k in range(n)]


def test_scores_say_what_must_be_computed() -> None:
    assert build_objective(recipe("sft")).scores == frozenset()
    assert build_objective(recipe("grpo")).scores == {"logp_ref"}
    twice = preset_fragment("grpo")
    twice["learner"]["epochs"] = 2
    assert build_objective(Recipe(**twice)).scores == {"logp_old", "logp_ref"}
    assert build_objective(recipe("ppo_rlhf")).scores == {"logp_old", "logp_ref", "value"}
    free = {"kl": {"place": "none"}, "reference": {"kind": "none"}}
    assert build_objective(recipe("grpo", **free, off_policy={"old": "detached"})).scores == frozenset()
    assert build_objective(recipe("grpo", **free, off_policy={"old": "rollout"})).scores == frozenset()
    weighted = recipe("grpo", **free, off_policy={"old": "detached", "weight": "token"})
    assert build_objective(weighted).scores == {"logp_old"}


ILLEGAL = {
    "group_size must be >= 2": lambda f: f["rollout"].update(group_size=1),
    "const_length": lambda f: f["objective"].update(aggregation={"mode": "const"}),
    "reference.kind=frozen": lambda f: f["objective"].update(reference={"kind": "none"}),
    "count twice": lambda f: f["objective"].update(off_policy={"old": "rollout", "weight": "token"}),
    "one optimiser step": lambda f: (
        f["objective"].update(off_policy={"old": "detached"}),
        f["learner"].update(updates=2),
    ),
    "critic.kind=policy": lambda f: f["objective"].update(advantage={"kind": "gae"}),
    "never used": lambda f: f["objective"].update(critic={"kind": "policy"}),
    "kl.target": lambda f: f["objective"]["kl"].update(controller="adaptive"),
    "no reader": lambda f: f["objective"].update(policy={"kind": "none"}, nll={"coef": 1.0}),
    "structure=pairs": lambda f: f["objective"].update(pair={"coef": 1.0}),
    "train_on=sampled": lambda f: f["objective"].update(train_on="demo"),
    "must be below high": lambda f: f["objective"].update(off_policy={"reject": "geo", "low": 2.0, "high": 1.0}),
}


@pytest.mark.parametrize("message", ILLEGAL)
def test_illegal_combinations_are_refused_by_name(message: str) -> None:
    fragment = preset_fragment("grpo")
    change: Callable[[dict[str, object]], object] = ILLEGAL[message]
    change(fragment)
    with pytest.raises(ObjectiveError, match=message):
        validate(Recipe(**fragment))


def test_warnings() -> None:
    assert validate(recipe("grpo", advantage={"kind": "zscore", "whiten": True}))[0].startswith(
        "objective.advantage.whiten"
    )
    assert "no effect" in validate(recipe("grpo", policy={"ratio": "sequence"}))[0]
    fragment = preset_fragment("grpo")
    fragment["rollout"]["top_p"] = 0.9
    fragment["objective"]["off_policy"] = {"old": "rollout"}
    assert "recomputed" in validate(Recipe(**fragment))[0]
    assert {name: validate(recipe(name)) for name in PRESETS} == {name: [] for name in PRESETS}


def bonus(objective: Objective) -> Objective:
    return replace(objective, terms=(*objective.terms, EntropyTerm(coef=0.01)))


OWN = Preset("own", "group", "here", "with an entropy bonus", PRESETS["grpo"].fragment, bonus)


def test_presets() -> None:
    with pytest.raises(ObjectiveError, match="did you mean 'grpo'"):
        preset_fragment("gpro")
    with pytest.raises(ObjectiveError, match="cannot be imported"):
        find_preset("nowhere:NAME")
    with pytest.raises(ObjectiveError, match=r"not a retool\.objectives\.Preset"):
        find_preset("retool.objectives:PRESETS")
    name = f"{__name__}:OWN"
    built = build_objective(Recipe(**preset_fragment(name)))
    assert [t.name for t in built.terms] == ["policy", "kl", "entropy"] and built.name == name
    before = preset_fragment("grpo")
    before["objective"]["structure"] = "changed"
    assert PRESETS["grpo"].fragment["objective"]["structure"] == "group"


def test_group_relative_ignores_uncounted_members() -> None:
    batch = ragged([[1]] * 3, score=[1.0, 0.0, 100.0], group=[0, 0, 0], in_baseline=[True, True, False])
    assert GroupRelative("mean")(batch)["advantage"].tolist() == [0.5, -0.5, 99.5]


def test_preset_table() -> None:
    """Each preset resolves to the row of the specification."""
    ppo, grpo, sft = (recipe(n) for n in ("ppo_rlhf", "grpo", "sft"))
    o = ppo.objective
    assert (o.kl.place, o.kl.estimator, o.kl.beta) == ("reward", "k1", 0.01)
    assert (o.advantage.kind, o.advantage.lam, o.advantage.gamma, o.advantage.whiten) == ("gae", 1.0, 1.0, True)
    assert (o.policy.clip_low, o.policy.clip_high, o.policy.dual_clip, o.critic.value_clip) == (0.2, 0.2, None, 0.2)
    assert o.aggregation.mode == "token_mean"
    o = grpo.objective
    assert (o.kl.place, o.kl.estimator, o.kl.beta) == ("loss", "k3", 0.04)
    assert (o.advantage.kind, o.advantage.std, o.advantage.eps) == ("zscore", "sample", 1e-6)
    assert (o.policy.clip_low, o.policy.clip_high, o.aggregation.mode) == (0.2, 0.2, "seq_mean_token_mean")
    assert (sft.objective.train_on, sft.objective.nll.coef) == ("demo", 1.0)
