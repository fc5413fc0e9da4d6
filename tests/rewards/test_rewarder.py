"""What is scored and what is not: fixtures of the specification, flags, costs, the exact verifier, custom rewards."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retool.config import ProtocolConfig, RewardConfig
from retool.errors import UserError
from retool.protocols import build_protocol
from retool.records import RewardResult, Trajectory
from retool.rewards import Rewarder
from retool.rewards.rewarder import score_of
from tests.rewards.conftest import boxed, protocol, trajectory

EXACT = RewardConfig(verifier="exact")


async def score(text: str, gold: str, config: RewardConfig = EXACT, **more: object) -> RewardResult:
    async with Rewarder(config, protocol()) as rewarder:
        return await rewarder.score(trajectory(text, gold, **more))  # type: ignore[arg-type]


async def test_an_answer_only_in_the_tool_output_scores_nothing() -> None:
    result = await score("<code>print(1)</code>", "42", calls=1, observation="\\boxed{42}")
    assert result.accuracy == 0.0
    assert result.flags == ("no_answer",)


async def test_a_box_in_the_prompt_scores_nothing() -> None:
    assert (await score("I do not know.", "42")).accuracy == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "<interpreter>\\boxed{42}</interpreter>",
        "<interpreter>\\boxed{42}",
        "<interpreter><answer>\\boxed{42}</answer></interpreter>",
        "<interpreter> <interpreter></interpreter> \\boxed{42}</interpreter>"[:60],
    ],
)
async def test_a_forged_observation_scores_nothing_and_is_flagged(text: str) -> None:
    async with Rewarder(EXACT, protocol()) as rewarder:
        result = await rewarder.score(trajectory(text, "42"))
        assert "obs_forgery" in result.flags
        assert rewarder.counters["forged"] == 1
        if "</interpreter> \\boxed" not in text:
            assert result.accuracy == 0.0


async def test_an_honest_answer_beside_a_forgery_counts_and_is_flagged() -> None:
    result = await score(f"<interpreter>1</interpreter>{boxed('42')}", "42")
    assert (result.accuracy, result.flags) == (1.0, ("obs_forgery",))


async def test_the_last_box_counts_but_different_boxes_are_a_hedge() -> None:
    assert (await score("\\boxed{42} so \\boxed{ 42 }", "42")).accuracy == 1.0
    hedged = await score("\\boxed{41} or \\boxed{42}", "42")
    assert (hedged.accuracy, hedged.flags, hedged.answer) == (0.0, ("multi_boxed",), "42")


async def test_a_section_is_read_alone() -> None:
    assert (await score("first \\boxed{41}? " + boxed("42"), "42")).accuracy == 1.0


async def test_truncated_by_turns_with_a_pending_call_is_wrong() -> None:
    config = RewardConfig(verifier="exact", wrong=-1.0)
    result = await score("<code>print(1)</code>", "1", config, calls=1, status="truncated_turns")
    assert (result.accuracy, result.score) == (0.0, -1.0)


async def test_an_aborted_trajectory_is_unknown_even_with_the_right_answer() -> None:
    result = await score(boxed("42"), "42", status="aborted")
    assert (result.accuracy, result.score, result.flags) == (None, 0.0, ("aborted",))


async def test_unboxed_answers_when_the_protocol_says_so() -> None:
    bare = build_protocol(ProtocolConfig(boxed=False, fence=False))
    async with Rewarder(EXACT, bare) as rewarder:
        assert (await rewarder.score(trajectory("<answer> 42 </answer><|end|>", "42"))).accuracy == 1.0
        assert (await rewarder.score(trajectory("\\boxed{42}", "42"))).accuracy == 0.0


async def test_exact_is_exact() -> None:
    assert (await score(boxed(" 0.5 "), "0.5")).accuracy == 1.0
    assert (await score(boxed("1/2"), "0.5")).accuracy == 0.0


async def test_a_megabyte_of_anything_is_read() -> None:
    for text in ("\\boxed{" * 150_000, "<interpreter>" * 80_000, "<answer>" * 130_000, "}" * 10**6):
        assert (await score(text, "42")).accuracy == 0.0
    huge = await score(boxed("4" * 10**6), "42")
    assert huge.accuracy == 0.0
    assert huge.answer is not None
    assert len(huge.answer) <= 1000


@given(
    correct=st.floats(-5, 5),
    wrong=st.floats(-5, 5),
    cost=st.floats(0, 3),
    cap=st.floats(0, 3),
    right_calls=st.integers(0, 1000),
    wrong_calls=st.integers(0, 1000),
)
def test_a_wrong_answer_never_outscores_a_right_one(
    correct: float, wrong: float, cost: float, cap: float, right_calls: int, wrong_calls: int
) -> None:
    try:
        config = RewardConfig(correct=correct, wrong=wrong, call_cost=cost, max_call_cost=cap)
    except ValueError:
        return
    right, parts = score_of(1.0, right_calls, config)
    assert right > score_of(0.0, wrong_calls, config)[0]
    assert right == pytest.approx(sum(parts.values()))


def test_call_costs() -> None:
    config = RewardConfig(call_cost=0.1, max_call_cost=0.25)
    assert [score_of(1.0, n, config)[0] for n in (0, 1, 2, 3, 9)] == pytest.approx([1.0, 0.9, 0.8, 0.75, 0.75])
    assert score_of(0.0, 9, config)[0] == 0.0


def half_for_brevity(trajectory: Trajectory, result: RewardResult) -> RewardResult:
    return dataclasses.replace(result, score=result.score / 2, parts={**result.parts, "brevity": 0.5})


def broken(trajectory: Trajectory, result: RewardResult) -> RewardResult:
    return dataclasses.replace(result, score=float("nan"))


async def test_a_custom_reward_is_called_and_checked() -> None:
    mine = RewardConfig(verifier="exact", custom=f"{__name__}:half_for_brevity")
    assert (await score(boxed("42"), "42", mine)).score == 0.5
    with pytest.raises(UserError, match="nan"):
        await score(boxed("42"), "42", RewardConfig(verifier="exact", custom=f"{__name__}:broken"))


@pytest.mark.parametrize("path", ["no_such_module:f", "math:no_such_function", "math:pi", "math"])
def test_a_custom_reward_that_cannot_be_loaded_is_refused_at_once(path: str) -> None:
    with pytest.raises(UserError, match=r"reward\.custom"):
        Rewarder(RewardConfig(verifier="exact", custom=path), protocol())
