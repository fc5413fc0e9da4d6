"""The four scopes, filters, state, presets and refused combinations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retool.config import Recipe
from retool.objectives import (
    PRESETS,
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
from retool.objectives.preset import over
from retool.objectives.terms import EntropyTerm, PolicyTerm
from tests.objectives.build_batches import f64, ragged


def recipe(preset: str, **objective: object) -> Recipe:
    fragment = preset_fragment(preset)
    fragment["objective"] |= objective
    return Recipe(**fragment)


def test_adaptive_beta_moves_once_a_rollout() -> None:
    objective = Objective("x", Raw(), (PolicyTerm(),), kl=KlPenalty("reward", "k1", 0.1, target=6.0, horizon=10_000))
    columns = {"logp_old": [[6.0, 6.0]] * 4, "logp_ref": [[0.0, 0.0]] * 4, "logp_rollout": [[0.0] * 2] * 4}
    batch = ragged([[1, 1]] * 4, columns, score=[1.0] * 4)
    out, state, metrics = objective.prepare(batch, objective.initial_state())
    assert metrics["kl/beta"] == 0.1 and metrics["kl/reference"] == 6.0
    assert state.beta == pytest.approx(0.1 * (1 + 0.2 * 4 / 10_000))
    assert out["kl_reward"].tolist() == pytest.approx([-0.6] * 8)
    assert out["advantage"][:2].tolist() == pytest.approx([1 - 1.2, 1 - 0.6])


def test_tv_dyn_filter_reads_accuracy_not_score() -> None:
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
    assert AccuracyFilter("drop", "all_wrong")(batch)[0]["group"].unique().tolist() == [0, 1, 3]
    assert AccuracyFilter("drop", "all_right")(batch)[0]["group"].unique().tolist() == [1, 2, 3]


def test_tv_dyn_what_filtering_on_scores_would_teach() -> None:
    for score, expected in (
        ([1, 1, 0.5, 0], [0.9045, 0.9045, -0.3015, -1.5076]),
        ([-1, -1, -0.9, -0.6], [-0.7625, -0.7625, -0.1525, 1.6775]),
    ):
        batch = ragged([[1]] * 4, score=score, group=[0] * 4)
        assert GroupRelative("zscore", "population")(batch)["advantage"].tolist() == pytest.approx(expected, abs=1e-4)


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


def change(**objective: object) -> Callable[[dict[str, Any]], object]:
    return lambda fragment: fragment["objective"].update(objective)


ILLEGAL: dict[str, Callable[[dict[str, Any]], object]] = {
    "group_size must be >= 2": lambda f: f["rollout"].update(group_size=1),
    "const_length": lambda f: f["objective"].update(
        aggregation={"mode": "const"},
        train_on="demo",
        policy={"kind": "none"},
        advantage={"kind": "none"},
        nll={"coef": 1.0},
    ),
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
    "baseline is for kind=returns": change(advantage={"kind": "mean", "baseline": "group"}),
    "baseline=group compares": lambda f: (
        f["objective"].update(advantage={"kind": "returns", "baseline": "group"}),
        f["rollout"].update(group_size=1),
    ),
    "praises every sample": change(advantage={"kind": "ones"}),
    "must not exceed max_keep": change(tracker={"min_keep": 0.9, "max_keep": 0.5}),
    "filter.kind=drop looks at groups": lambda f: (
        f["objective"].update(advantage={"kind": "raw"}, filter={"kind": "drop"}),
        f["rollout"].update(group_size=1),
    ),
    "roc chooses within groups": lambda f: (
        f["objective"].update(advantage={"kind": "raw"}, filter={"roc": 0.5}),
        f["rollout"].update(group_size=1),
    ),
    "which groups, not what": change(filter={"groups": "all_wrong"}),
    "needs objective.filter.overlong=mask_loss": change(filter={"overlong_in_baseline": False}),
    "tear pairs apart": change(structure="pairs", pair={"coef": 1.0}, filter={"void": "mask_loss"}),
    "dual_clip belongs to the clip": change(policy={"kind": "sapo", "dual_clip": 3.0}),
    "cap is CISPO's": change(policy={"cap": 5.0}),
    "ratio=sequence is for policy.kind=clip": change(policy={"kind": "cispo", "ratio": "sequence"}),
    "splits that ratio in two": change(policy={"kind": "sapo"}, off_policy={"weight": "token"}),
    "chooses tokens of the policy term": change(
        policy={"kind": "none"}, advantage={"kind": "none"}, nll={"coef": 1.0}, select=[{"kind": "random"}]
    ),
    "kl_cov holds back": change(
        policy={"kind": "none"}, advantage={"kind": "none"}, nll={"coef": 1.0}, kl_cov={"coef": 1.0}
    ),
    "entropy_coef < 0": change(kl_cov={"coef": 1.0}, entropy_coef=-0.01),
    "source=current needs minibatch": change(select=[{"kind": "entropy", "scope": "rollout", "source": "current"}]),
    "none are": change(select=[{"kind": "clip_cov", "low": 5.0, "high": 1.0}]),
}


@pytest.mark.parametrize("message", ILLEGAL)
def test_illegal_combinations_are_refused_by_name(message: str) -> None:
    fragment = preset_fragment("grpo")
    ILLEGAL[message](fragment)
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
    assert {name: found for name in PRESETS if (found := validate(recipe(name)))} == {}


WARNED: dict[str, dict[str, dict[str, object]]] = {
    "advantage.gamma is ignored": {"objective": {"advantage": {"gamma": 0.9}}},
    "wrong answers have no gradient": {"objective": {"advantage": {"kind": "raw"}}, "reward": {"wrong": 0.0}},
    "policy.kind=cispo has no effect": {"objective": {"policy": {"kind": "cispo"}}},
    "kl_cov has no effect": {"objective": {"kl_cov": {"coef": 1.0}}},
    "kind=off_policy has no effect": {"objective": {"select": [{"kind": "off_policy"}]}},
    "kind=plain has no ratio": {"objective": {"policy": {"kind": "plain"}}, "learner": {"updates": 2}},
    "collapses with length": {"objective": {"off_policy": {"weight": "sequence"}}},
    "more than the 2 groups": {"rollout": {"prompts": 2}, "learner": {"updates": 4}},
    "lambda is below 0.5": {
        "objective": {"advantage": {"kind": "gae", "lam": {"alpha": 0.05}}, "critic": {"kind": "policy"}},
        "rollout": {"max_tokens": 30},
    },
}


@pytest.mark.parametrize("message", WARNED)
def test_more_warnings(message: str) -> None:
    assert any(message in w for w in validate(Recipe(**over(preset_fragment("grpo"), **WARNED[message]))))


def test_const_divides_by_the_longest_response() -> None:
    fragment = over(preset_fragment("dr_grpo"), rollout={"max_tokens": 77})
    assert build_objective(Recipe(**fragment)).terms[0].aggregation.const_length == 77
    said = over(fragment, objective={"aggregation": {"const_length": 5}})
    assert build_objective(Recipe(**said)).terms[0].aggregation.const_length == 5


def bonus(objective: Objective) -> Objective:
    return replace(objective, terms=(*objective.terms, EntropyTerm(coef=0.01)))


OWN = Preset("own", "group", "here", "with an entropy bonus", PRESETS["grpo"].fragment, bonus)


def test_presets() -> None:
    with pytest.raises(ObjectiveError, match="did you mean 'reinforce'"):
        preset_fragment("reinforze")
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
