"""docs/rewards.md: every example loads and can be run; combinations of rewards and objectives; `retool regrade`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from retool.config import RewardConfig
from retool.errors import UserError
from retool.objectives.validate import validate
from retool.recipe import all_keys, load_recipe, resolve
from retool.records import Group, RewardResult, Trajectory
from retool.regrade import regrade
from retool.rewards.tripwires import FLAGS
from retool.rollout.log import RolloutLog
from retool.transcript import Span, Transcript
from tests.rewards.conftest import boxed, trajectory

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_load(example: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    base = {"problems": {"kind": "jsonl", "path": "mine.jsonl"}, "objective": "grpo"}
    file.write_text(yaml.safe_dump(base | yaml.safe_load(example)), encoding="utf-8")
    recipe = load_recipe(file)
    assert recipe.reward != RewardConfig() or "verifier: math" in example
    validate(recipe)


def test_every_reward_part_and_flag_stands_on_the_page() -> None:
    assert len(EXAMPLES) >= 10
    for flag in FLAGS:
        assert f"`{flag}`" in PAGE, flag
    for name, info in all_keys(RewardConfig):
        assert info.description, name


def recipe(**sections: Any) -> Any:
    return resolve({"problems": {"kind": "jsonl", "path": "x.jsonl"}, "objective": "grpo", **sections})


def test_what_reward_and_objective_cannot_do_together() -> None:
    with pytest.raises(UserError, match=r"zscore.*twice"):
        validate(recipe(reward={"zscore": "batch"}))
    with pytest.raises(UserError, match=r"protocol\.boxed"):
        validate(recipe(reward={"verifier": "unit_tests"}))
    overlong = {"overlong": {"max_tokens": 20480, "buffer": 4096}}  # of no account for short responses
    validate(recipe(reward=overlong, rollout={"max_tokens": 110}))
    validate(recipe(reward={**overlong, "wrong": -1}, rollout={"max_tokens": 20480}))
    with pytest.raises(UserError, match=r"20480 tokens.*right_wins"):
        validate(recipe(reward=overlong, rollout={"max_tokens": 20480}))
    warnings = validate(recipe(reward={"wrong": -1, "tool_bonus": {}}))
    assert any("call for its own sake" in w for w in warnings)
    filtered = {"preset": "grpo", "filter": {"kind": "drop"}}
    assert not any(
        "own sake" in w for w in validate(recipe(reward={"wrong": -1, "tool_bonus": {}}, objective=filtered))
    )
    assert any("right_wins" in w for w in validate(recipe(reward={"format": {"weight": 1.0}, "right_wins": False})))
    rloo = {"preset": "grpo", "advantage": {"kind": "rloo"}}
    assert any("baseline" in w for w in validate(recipe(reward={"zscore": "batch"}, objective=rloo)))


async def test_unknown_rewards_stay_in_the_log_and_are_regraded(tmp_path: Path) -> None:
    unknown, right = RewardResult(None, 0.0, flags=("judge_failed",)), RewardResult(1.0, 1.0)
    planted = RewardResult(None, 0.0, flags=("canary",))
    members: list[Trajectory] = []
    rewards = [unknown, unknown, right, None, planted]
    for i, (answer, reward) in enumerate(zip(("42", "41", "41", "42", "42"), rewards)):
        t = trajectory(boxed(answer), "42", status="aborted" if reward is None else "finished")
        t.id, t.index, t.reward = f"0.0.{i}", i, reward
        t.transcript = Transcript([Span("prompt", (1,))])
        members.append(t)
    (tmp_path / "recipe.yaml").write_text("reward: {verifier: math}\n", encoding="utf-8")
    with RolloutLog(tmp_path / "rollouts") as log:
        log.append(Group("0.0", 0, members[0].problem, members))
    assert await regrade(tmp_path, ["reward.verifier=exact"]) == {"right": 1, "wrong": 1, "unknown": 0}
    with RolloutLog(tmp_path / "rollouts", read_only=True) as log:
        found = [t.reward for t in log.read_group("0.0").trajectories]
    assert [r and r.accuracy for r in found] == [1.0, 0.0, 1.0, None, None]
    assert found[2] == right
