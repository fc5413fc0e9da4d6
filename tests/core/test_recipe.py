"""Recipes: precedence, overrides, and errors that name the key and the nearest valid one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from retool.config import Recipe
from retool.recipe import RecipeError, all_keys, dump_recipe, load_recipe, resolve

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    file = folder / "r.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("file", RECIPES, ids=lambda p: p.stem)
def test_every_committed_recipe_loads_and_survives_a_round_trip(file: Path) -> None:
    recipe = load_recipe(file)
    assert resolve(yaml.safe_load(dump_recipe(recipe))) == recipe


def test_precedence_is_override_then_recipe_then_preset_then_default(tmp_path: Path) -> None:
    file = write(tmp_path, "objective: ppo_rlhf\nlearner: {lr: 2.0e-5}\n")
    plain = resolve({"objective": "ppo_rlhf"})
    assert plain.objective.preset == "ppo_rlhf"
    recipe = load_recipe(file)
    assert recipe.learner.lr == 2e-5
    assert recipe.reward == plain.reward  # what the preset sets and the recipe does not mention
    assert load_recipe(file, ["learner.lr=1e-3", "objective=grpo"]).learner.lr == 1e-3
    assert load_recipe(file, ["objective=grpo"]).objective.preset == "grpo"


def test_extends_lays_a_recipe_over_another(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("steps: 7\nlearner: {lr: 0.5, epochs: 2}\n")
    recipe = load_recipe(write(tmp_path, "extends: base.yaml\nlearner: {lr: 0.25}\n"))
    assert (recipe.steps, recipe.learner.lr, recipe.learner.epochs) == (7, 0.25, 2)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("learner: {lrr: 1}", [], "unknown key 'learner.lrr'; did you mean 'learner.lr'"),
        ("steps: 3", ["rollout.groupsize=4"], "did you mean 'rollout.group_size'"),
        ("lr: 3", [], "did you mean 'learner.lr'"),
        ("objective: grop", [], "grpo"),
        ("steps: 0", [], "steps"),
        ("steps: many", [], "steps"),
        ("reward: {correct: 1, wrong: 0, max_call_cost: 1}", [], "must stay above wrong"),
        ("rollout: {group_size: 1}", [], "rollout.group_size must be >= 2"),
        ("objective: {preset: ppo_rlhf, critic: {kind: none}}", [], "needs values: set objective.critic.kind"),
        ("steps: 3", ["steps"], "write it as key=value"),
        ("steps: 3", ["steps.a=1"], "'steps' is a value"),
        ("- 1", [], "YAML mapping"),
        ("", [], "YAML mapping"),
        ("a: [", [], "cannot be read as YAML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(RecipeError, match=message.replace("(", r"\(")):
        load_recipe(file, overrides)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no recipe .*nothing\.yaml"):
        load_recipe(tmp_path / "nothing.yaml")


def test_every_key_is_explained() -> None:
    silent = [key for key, info in all_keys(Recipe) if not info.description]
    assert silent == []
