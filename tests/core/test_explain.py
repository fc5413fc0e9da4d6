"""`retool objectives` and `retool explain`: every key and preset explains itself, and slips are answered."""

from __future__ import annotations

import json

import pytest

from retool.errors import UserError
from retool.explain import describe, objective_rows, print_key, print_objectives
from retool.objectives import PRESETS
from retool.recipe import all_keys


def test_every_key_has_a_description_and_can_be_explained(capsys: pytest.CaptureFixture[str]) -> None:
    for key, info in all_keys():
        assert info.description, key
    for key in ("rollout.dynamic.max_staleness", "objective.select.share", "objective.advantage.lam.alpha"):
        print_key(key)
        assert key in capsys.readouterr().out


def test_items_of_lists_are_explained_with_and_without_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    print_key("objective.select.share")
    plain = capsys.readouterr().out
    print_key("objective.select.0.share")
    assert capsys.readouterr().out == plain and "0.2" in plain


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_is_described(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_key(name)
    out = capsys.readouterr().out
    assert name in out and "source:" in out
    structure, needs = describe(name)
    assert structure in ("flat", "group", "chain", "tree", "pairs") and all(needs)


def test_the_table_says_what_each_needs(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {r["name"]: r for r in objective_rows()}
    assert set(rows) == set(PRESETS)
    assert "critic" in rows["ppo_rlhf"]["needs"] and "reference" in rows["ppo_rlhf"]["needs"]
    assert "4 updates a rollout" in rows["ppo_rlhf"]["needs"]
    assert "a group of two or more" in rows["grpo"]["needs"] and "critic" not in rows["grpo"]["needs"]
    assert "demonstrations" in rows["sft"]["needs"]
    print_objectives(as_json=True)
    assert {r["name"]: r for r in json.loads(capsys.readouterr().out)} == rows
    print_objectives(as_json=False)
    assert "structure" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("rollout.group_sise", "rollout.group_size"),
        ("objective.select.shar", "objective.select.share"),
        ("rlooo", "rloo"),
        ("ppo_rlfh", "ppo_rlhf"),
        ("max_stalenes", "rollout.dynamic.max_staleness"),
    ],
)
def test_unknown_keys_are_answered_with_the_nearest(key: str, near: str) -> None:
    with pytest.raises(UserError, match=f"did you mean '{near}'"):
        print_key(key)
