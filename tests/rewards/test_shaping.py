"""TV-SHAPE and what follows from it: shaping telescopes, cancels in a group, and reaches the learner turn by turn."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retool.config import RewardConfig
from retool.config.reward import ShapingConfig, TurnsConfig
from retool.errors import UserError
from retool.learner.collate import collate
from retool.objectives.advantages import group_advantage
from retool.records import ToolCall, Trajectory
from retool.rewards import Rewarder
from retool.rewards.shaping import calls_ok, discounted, last_call_ok, shape, terminal, turn_shaping
from retool.rollout.codec_rows import load_reward, reward_record
from retool.rollout.groups import to_sample
from retool.transcript import Span, Transcript
from tests.rewards.conftest import boxed, protocol, trajectory

PHI = [0.0, 0.3, 0.1, 0.9]


def test_tv_shape() -> None:
    assert shape(PHI, 1.0) == pytest.approx([0.3, -0.2, 0.8])
    assert sum(shape(PHI, 1.0)) == pytest.approx(0.9)
    assert shape(PHI, 0.9) == pytest.approx([0.27, -0.21, 0.71])
    assert discounted(shape(PHI, 0.9), 0.9) == pytest.approx(0.6561)
    ended = shape(terminal(PHI), 1.0)
    assert ended[-1] == pytest.approx(-0.1)
    assert sum(ended) == pytest.approx(0.0)


def test_tv_shape_i_a_proper_potential_cancels_in_a_group() -> None:
    one = torch.tensor([0, 0, 0])
    counted = torch.ones(3, dtype=torch.bool)
    for rewards in ([1.0, 0.0, 0.0], [0.6, -0.4, -0.4]):
        advantage = group_advantage(torch.tensor(rewards, dtype=torch.float64), one, counted, "mean")
        assert advantage.tolist() == pytest.approx([0.6667, -0.3333, -0.3333], abs=1e-4)


def in_turns(text: str, statuses: list[str]) -> Trajectory:
    """A trajectory with one policy turn a call and a last one."""
    mine = trajectory(text, "42")
    spans = [Span("prompt", (1,))]
    for turn in range(len(statuses) + 1):
        spans.append(Span("policy", (2, 3), turn=turn, logprobs=(-1.0, -1.0), versions=((0, 0),)))
        if turn < len(statuses):
            spans.append(Span("tool", (4,), turn=turn, kind="observation"))
    mine.transcript = Transcript(spans)
    mine.tool_calls = [ToolCall(i, "", s, "") for i, s in enumerate(statuses)]
    return mine


@given(
    values=st.lists(st.floats(-5, 5), min_size=1, max_size=6),
    gamma=st.floats(0.1, 1.0),
)
def test_it_telescopes_for_every_potential(values: list[float], gamma: float) -> None:
    mine = in_turns(boxed("42"), ["ok"] * (len(values) - 1))
    shaped = turn_shaping(mine, len(values), lambda _, k: values[k], gamma, "test")
    assert discounted(shaped, gamma) == pytest.approx(-values[0], abs=1e-9)


def test_built_in_potentials_look_back_alone() -> None:
    mine = in_turns("", ["ok", "error", "ok"])
    assert [last_call_ok(mine, k) for k in range(5)] == [0, 1, 0, 1, 1]
    assert [calls_ok(mine, k) for k in range(5)] == pytest.approx([0, 1, 1 / 2, 2 / 3, 2 / 3])


def constant(trajectory: Trajectory, turns: int) -> float:
    return 0.4


def infinite(trajectory: Trajectory, turns: int) -> float:
    return float("inf")


async def test_a_sample_earns_minus_the_first_potential_however_it_went() -> None:
    config = RewardConfig(verifier="exact", shaping=ShapingConfig(potential=f"{__name__}:constant"))
    async with Rewarder(config, protocol()) as rewarder:
        right = await rewarder.score(in_turns(boxed("42"), ["ok"]))
        wrongs = [await rewarder.score(in_turns(boxed("1"), s)) for s in ([], ["error"], ["ok"] * 5)]
    assert right.score == pytest.approx(0.6)
    assert [w.score for w in wrongs] == pytest.approx([-0.4] * 3)
    assert right.parts["shaping"] == pytest.approx(-0.4)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
async def test_turn_rewards_with_the_score_on_the_last_turn_are_what_each_turn_earned(gamma: float) -> None:
    config = RewardConfig(
        verifier="exact", shaping=ShapingConfig(gamma=gamma), turns=TurnsConfig(failed_call=0.1, cap=0.5)
    )
    async with Rewarder(config, protocol()) as rewarder:
        result = await rewarder.score(in_turns(boxed("42"), ["ok", "error"]))
    earned = [*result.turn_rewards[:-1], result.turn_rewards[-1] + result.score]
    assert earned == pytest.approx([gamma, -1.0 - 0.1, 1.0])  # Φ = 0, 1, 0 and then the end
    if gamma == 1.0:
        assert sum(result.turn_rewards) == pytest.approx(0.0)
    assert load_reward(reward_record(result)) == result


async def test_t10_gtpo_turn_rewards_reach_the_learner() -> None:
    """T10: turn rewards [-.1, 0, 1] are -.1 for a failed call, 0, and the outcome."""
    config = RewardConfig(verifier="exact", turns=TurnsConfig(failed_call=0.1))
    mine = in_turns(boxed("42"), ["error", "ok"])
    async with Rewarder(config, protocol()) as rewarder:
        mine.reward = await rewarder.score(mine)
    batch = collate([to_sample(mine)], "sampled", torch.float64).batch
    given = batch["turn_reward"].clone()
    given[-1] += batch["score"][0]
    #          turn 0   tool  turn 1  tool  turn 2
    expected = [0, -0.1, 0.0, 0, 0.0, 0.0, 0, 1.0]
    assert given.tolist() == pytest.approx(expected)


async def test_potentials_that_cannot_be_used_are_refused() -> None:
    for name in ("nothing", "no_such_module:f"):
        with pytest.raises(UserError, match=r"reward\.shaping\.potential"):
            Rewarder(RewardConfig(verifier="exact", shaping=ShapingConfig(potential=name)), protocol())
    config = RewardConfig(verifier="exact", shaping=ShapingConfig(potential=f"{__name__}:infinite"))
    async with Rewarder(config, protocol()) as rewarder:
        with pytest.raises(UserError, match="finite"):
            await rewarder.score(in_turns(boxed("42"), []))
