"""Procedural families: the teacher's code prints the answer, splits never meet, sets are reproducible."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retool.config import ProblemsConfig
from retool.problems import FAMILIES, Item, ProblemError, load_problems, register

DEMO = ("product", "power_mod", "larger")


def config(**keys: object) -> ProblemsConfig:
    return ProblemsConfig(**{"families": DEMO, "count": 90, **keys})  # type: ignore[arg-type]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_teachers_code_prints_the_answer(family: str) -> None:
    """Really run, many at once in one process."""
    rng = random.Random(7)
    items = [FAMILIES[family].make(rng) for _ in range(50)]
    script = "\n".join(item.code for item in items)
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [item.answer for item in items]


@pytest.mark.parametrize("family", DEMO)
def test_demo_prompts_suit_a_very_small_model(family: str) -> None:
    rng = random.Random(1)
    for item in (FAMILIES[family].make(rng) for _ in range(200)):
        assert len(item.prompt) <= 25
        assert len(item.code) <= 25
        assert item.prompt.isascii()
        assert item.prompt.isprintable()


def test_two_demo_families_need_the_tool_and_one_does_not() -> None:
    assert [FAMILIES[f].needs_tool for f in DEMO] == [True, True, False]


@given(seed=st.integers(0, 50), other=st.integers(0, 50))
def test_train_and_test_never_share_a_prompt(seed: int, other: int) -> None:
    train = load_problems(config(seed=seed))
    test = load_problems(config(seed=other, split="test"))
    assert not {p.prompt for p in train} & {p.prompt for p in test}
    assert not {p.id for p in train} & {p.id for p in test}


def test_equal_seeds_give_equal_sets_and_ids_do_not_depend_on_the_order() -> None:
    first = load_problems(config(seed=3))
    assert load_problems(config(seed=3)) == first
    unshuffled = load_problems(config(seed=3, shuffle=False))
    assert [p.id for p in unshuffled] != [p.id for p in first]
    assert sorted(p.id for p in unshuffled) == sorted(p.id for p in first)
    assert load_problems(config(seed=4)) != first
    assert [p.family for p in unshuffled[:6]] == [*DEMO, *DEMO]


def test_a_set_is_balanced_and_has_no_repetition() -> None:
    problems = load_problems(config(count=3000))
    assert len({p.prompt for p in problems}) == len({p.id for p in problems}) == 3000
    assert all(sum(p.family == f for p in problems) == 1000 for f in DEMO)


def test_the_answer_is_not_in_a_prompt_that_needs_the_tool() -> None:
    for p in load_problems(config(families=("product",))):
        assert p.answer not in p.prompt
        assert p.meta["teacher"]["code"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"families": ()}, r"families is empty.*larger"),
        ({"families": ("prodcut",)}, "did you mean 'product'"),
        ({"families": ("zzz",)}, "known: "),
        ({"families": ("product", "product")}, "twice"),
        ({"count": None}, "count is missing"),
        ({"split": "validation"}, "splits train and test"),
        ({"families": ("larger",), "count": 9000}, "hardly more than"),
    ],
)
def test_what_cannot_be_made_is_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        load_problems(config(**keys))


def test_a_family_of_your_own() -> None:
    def half(rng: random.Random) -> Item:
        n = 2 * rng.randint(1, 10**6)
        return Item(f"Half of {n}?", str(n // 2), f"print({n}//2)")

    try:
        family = register("half", "half of an even number", needs_tool=False)(half)
        assert family.name == "half"
        problems = load_problems(config(families=("half",), count=5))
        assert all(p.family == "half" for p in problems)
        with pytest.raises(ValueError, match="exists already"):
            register("half", "", needs_tool=True)
    finally:
        FAMILIES.pop("half", None)
