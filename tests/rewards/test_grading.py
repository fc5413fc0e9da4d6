"""Verdicts of the mathematical verifier, asked through its worker process, one question after another."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from retool.config import RewardConfig
from retool.rewards import Rewarder
from tests.rewards.conftest import boxed, protocol, trajectory

RIGHT = [
    ("1/2", "0.5"),
    ("0.5", "\\frac{1}{2}"),
    ("\\frac12", "\\dfrac{1}{2}"),
    ("1,000", "1000"),
    ("1000", "1,000"),
    ("70000", "70{,}000"),
    ("18", "18.0"),
    ("18", "\\$18"),
    ("5", "5\\text{ cm}"),
    ("3", "x = 3"),
    ("x^2-1", "(x-1)(x+1)"),
    ("3\\sqrt{13}", "\\sqrt{117}"),
    ("(1,2]", "(1, 2]"),
    ("\\{1,2\\}", "\\{2,1\\}"),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3, \\pi/2)"),
    ("2^{10}", "1024"),
    ("\\text{Evelyn}", "Evelyn"),
    ("\\text{(B)}", "B"),
    ("p - q", "p-q"),
]
WRONG = [
    ("1/2", "1/3"),
    ("(1,2]", "[1,2]"),
    ("5", "5, 6"),
    ("3", "3 or 4"),
    ("x", "y"),
    ("5", "five apples and 6"),
    ("east", "west"),
    ("2", "1 < 2 < 3"),
    ("5", "\\text{5 or 6}"),
    ("10", "9.99"),
]
HOSTILE = [
    "9**9**9**9",
    "__import__('os').system('touch {canary}')",
    "open('{canary}','w')",
    "\\input{{{canary}}}",
    "\\frac{" * 200 + "}" * 200,
    "(" * 900,
    "\\sqrt{" * 100 + "1" + "}" * 100,
    "{" * 50 + "}" * 50,
    "\x00\ud800".encode("utf-8", "replace").decode(),
    "{" * 9 + "}" * 9,
    "\\frac{" * 9 + "1" + "}{2}" * 9,
    "1" * 900,
    "x" * 999,
    "\\begin{matrix}" * 20,
    "\\infty - \\infty",
    "\\frac{0}{0}",
    "nan",
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rewarder() -> AsyncIterator[Rewarder]:
    async with Rewarder(RewardConfig(timeout_s=60), protocol()) as ready:
        yield ready


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("gold", "answer"), RIGHT)
async def test_right(rewarder: Rewarder, gold: str, answer: str) -> None:
    assert (await rewarder.score(trajectory(boxed(answer), gold))).accuracy == 1.0


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("gold", "answer"), WRONG)
async def test_wrong(rewarder: Rewarder, gold: str, answer: str) -> None:
    assert (await rewarder.score(trajectory(boxed(answer), gold))).accuracy == 0.0


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("answer", HOSTILE)
async def test_hostile_answers_neither_win_nor_run(rewarder: Rewarder, answer: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    answer = answer.replace("{canary}", str(canary))
    assert (await rewarder.score(trajectory(boxed(answer), "18"))).accuracy in (0.0, None)
    assert not canary.exists()
    assert (await rewarder.score(trajectory(boxed("0.5"), "1/2"))).accuracy == 1.0


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("gold", ["\\frac", "\\begin{align", "???"])
async def test_an_unreadable_reference_makes_the_reward_unknown(rewarder: Rewarder, gold: str) -> None:
    result = await rewarder.score(trajectory(boxed("4"), gold))
    assert result.accuracy is None
    assert "unverifiable" in result.flags


@pytest.mark.asyncio(loop_scope="module")
async def test_restating_a_relation_wins_nothing(rewarder: Rewarder) -> None:
    """Asymmetry: a set may answer for a relation, but a chain must not answer for a number."""
    assert (await rewarder.score(trajectory(boxed("1 < x < 2"), "(1,2)"))).accuracy == 0.0
    assert (await rewarder.score(trajectory(boxed("(1,2)"), "1 < x < 2"))).accuracy == 1.0
