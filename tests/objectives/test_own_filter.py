"""A filter of the user's own, named in a recipe."""

from __future__ import annotations

import pytest
import torch

from retool.config import Recipe
from retool.objectives import Batch, ObjectiveError, build_objective, preset_fragment
from tests.objectives.build_batches import ragged


def first_of_group(batch: Batch) -> tuple[Batch, dict[str, float]]:
    """Of each group only the first sample is learnt from."""
    first = torch.ones(len(batch), dtype=torch.bool)
    first[1:] = batch["group"][1:] != batch["group"][:-1]
    return batch.with_samples(in_loss=batch["in_loss"] & first), {"filter/mine": float(first.double().mean())}


NOT_A_FILTER = 3


def recipe(custom: str) -> Recipe:
    fragment = preset_fragment("reinforce_rej")
    fragment["objective"]["filter"]["custom"] = custom
    return Recipe(**fragment)


def test_it_comes_after_the_presets_own() -> None:
    batch = ragged([[1]] * 6, accuracy=[1, 0, 0, 1, 1, 1], group=[0, 0, 1, 1, 2, 2])
    kept, metrics = build_objective(recipe("tests.objectives.test_own_filter:first_of_group")).filter(batch)
    assert kept["group"].tolist() == [0, 0, 1, 1]  # the uniform group is rejected first
    assert kept["in_loss"].tolist() == [True, False, True, False]
    assert metrics["filter/mine"] == 0.5 and "filter/mixed_groups" in metrics


@pytest.mark.parametrize(
    ("custom", "message"),
    [
        ("nowhere:x", "objective.filter.custom 'nowhere:x' cannot be imported"),
        ("tests.objectives.test_own_filter:missing", "cannot be imported"),
        ("tests.objectives.test_own_filter", "module:NAME"),
        ("tests.objectives.test_own_filter:NOT_A_FILTER", "is a int, not a function"),
    ],
)
def test_what_is_none_is_refused_by_name(custom: str, message: str) -> None:
    with pytest.raises(ObjectiveError, match=message):
        build_objective(recipe(custom))
