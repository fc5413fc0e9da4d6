"""The benchmark of objectives: verdicts from figures, what runs when, and that every entry has a valid recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.objectives import plan
from benchmarks.objectives_claims import CLAIMS, Claim, claimed, judge
from benchmarks.objectives_run import VARIANTS, names, recipe_of, training_figures
from benchmarks.objectives_table import picture, tables
from retool.objectives import PRESETS, build_objective

CLAIM = Claim("a", "b", "entropy_last", 1, "a keeps more entropy than b")


def runs(a: list[float], b: list[float]) -> dict[str, Any]:
    return {name: {str(i): {"entropy_last": x} for i, x in enumerate(values)} for name, values in (("a", a), ("b", b))}


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ([0.5, 0.52, 0.51], [0.2, 0.21, 0.2], "shown"),
        ([0.2, 0.21, 0.2], [0.5, 0.52, 0.51], "contrary"),
        ([0.5, 0.1, 0.4], [0.3, 0.3, 0.3], "not shown"),
        ([0.5, 0.52], [0.2, 0.21], "not shown (fewer than 3 seeds)"),
        ([0.5], [], "not measured"),
        ([0.3, 0.3, 0.3], [0.3, 0.3, 0.3], "not shown"),
    ],
)
def test_verdicts(a: list[float], b: list[float], verdict: str) -> None:
    assert judge(CLAIM, runs(a, b))["verdict"] == verdict


def test_seeds_are_paired() -> None:
    """A difference that is the same in every seed is shown, however far apart the seeds are."""
    row = judge(CLAIM, runs([1.0, 2.01, 3.0], [0.9, 1.9, 2.9]))
    assert row["verdict"] == "shown" and row["difference"] == pytest.approx(0.1033, abs=1e-3)
    short = judge(CLAIM, runs([1.0, 2.0, 3.0], [0.9, 1.9]))
    assert short["seeds"] == 2


def test_everything_runs_once_before_claims_get_their_seeds() -> None:
    todo = plan([0, 1, 2], None)
    assert [n for n, _ in todo[: len(names())]] == names() and {s for _, s in todo[: len(names())]} == {0}
    rest = todo[len(names()) :]
    assert {n for n, _ in rest} == claimed() & set(names()) and {s for _, s in rest} == {1, 2}
    assert len(set(todo)) == len(todo)
    assert "sft" not in names()
    assert plan([0], ["grpo"]) == [("grpo", 0)]


@pytest.mark.parametrize("name", names())
def test_every_entry_has_a_recipe_of_its_own_objective(name: str, tmp_path: Path) -> None:
    recipe = recipe_of(name, 1, 3, 1, tmp_path)
    assert recipe.objective.preset == VARIANTS.get(name, (name, {}))[0]
    assert (recipe.seed, recipe.steps) == (1, 3) and recipe.rollout.prompts * recipe.rollout.group_size == 64
    build_objective(recipe)


def test_claims_are_about_names_that_exist_or_are_to_come() -> None:
    for claim in CLAIMS:
        assert claim.sign in (1, -1) and claim.preset != claim.baseline
        for name in (claim.preset, claim.baseline):
            assert name in PRESETS or name in VARIANTS or name.isidentifier()


def test_figures_of_a_run() -> None:
    metrics = [
        {"rollout/score": float(i), "rollout/accuracy": i / 10, "entropy": 1 - i / 10, "policy/clip_low": 0.1,
         "policy/clip_high": 0.2, "updates": 2.0, "trained_equals_sampled": 1.0}
        for i in range(8)
    ]  # fmt: skip
    found = training_figures([*metrics, {"rollout/accuracy": 0.8, "updates": 0.0}])
    assert found["reward_first"] == 1.0 and found["reward_last"] == 6.0
    assert found["entropy_first"] == pytest.approx(0.9) and found["clip_fraction"] == pytest.approx(0.3)
    assert found["explained_variance_first"] is None and found["trained_equals_sampled"] == 1.0


def test_table_and_picture() -> None:
    figures = {"accuracy": 0.5, "ci95": [0.4, 0.6], "length": 20.0, "code_ratio": 0.3, "kl_to_start": 0.01}
    run = {**figures, "seconds": 20.0, "tokens": 1000, "entropy_first": 0.5, "entropy_last": 0.3, "clip_fraction": None}
    settings = {"steps": 3, "prompts": 8, "group_size": 8, "updates": 2, "lr": 1e-4, "held_out": 150}
    data = {"settings": settings, "start": figures, "runs": {"grpo": {"0": run}, "grpo (no KL)": {"0": run}}}
    text = tables(data, [judge(c, data["runs"]) for c in CLAIMS])
    assert "| `grpo` | group | 0.50 (0.40–0.60) |" in text and "| `grpo (no KL)` | baseline |" in text
    assert all(claim.text in text for claim in CLAIMS)
    assert picture(data).startswith(b"<?xml")
