"""`retool regrade RUN`: ask the verifier again about trajectories whose reward stayed unknown.

They were dropped from training and stay in the rollout log. A new verdict replaces the unknown one there, for
`compare`, `view` and exports; nothing is trained on after the fact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from retool.errors import UserError
from retool.models import load_tokenizer
from retool.protocols import Codec, build_protocol
from retool.recipe import load_recipe
from retool.records import Trajectory
from retool.rewards import Rewarder
from retool.rollout.log import RolloutLog
from retool.run_folder import RECIPE, ROLLOUTS
from retool.train import tags_of
from retool.workshop import make_sandbox
from sandbox.types import Sandbox


def unknown(trajectory: Trajectory) -> bool:
    """Whether a verifier might still decide: not lost to a failure of ours, and no canary."""
    reward = trajectory.reward
    if trajectory.status == "aborted" or (reward is not None and "canary" in reward.flags):
        return False
    return reward is None or reward.accuracy is None


async def regrade(run: Path, overrides: Sequence[str] = ()) -> dict[str, int]:
    """Counts of `right`, `wrong` and still `unknown`. `overrides` change the run's recipe, e.g. the judge's URL.

    Raises `UserError` when `run` is no run folder, `RolloutLogError` while the run is being written.
    """
    if not (run / RECIPE).exists() or not (run / ROLLOUTS).exists():
        raise UserError(f"{str(run)!r} is not the folder of an RL run (no {RECIPE} and {ROLLOUTS} in it)")
    recipe = load_recipe(run / RECIPE, overrides)
    counts: Counter[str] = Counter(right=0, wrong=0, unknown=0)
    async with AsyncExitStack() as stack:
        log = stack.enter_context(RolloutLog(run / ROLLOUTS))
        box: Sandbox | None = None
        if recipe.reward.verifier == "unit_tests":
            box = await stack.enter_async_context(make_sandbox(recipe.sandbox))
        protocol = build_protocol(recipe.protocol)
        if protocol.native:  # forgeries are told by the chat template's frame
            protocol = Codec(load_tokenizer(recipe.model, tags_of(recipe)), protocol).protocol
        rewarder = await stack.enter_async_context(Rewarder(recipe.reward, protocol, box))
        for group in log:
            for trajectory in filter(unknown, group.trajectories):
                reward = await rewarder.score(trajectory)
                if reward.accuracy is None:
                    counts["unknown"] += 1
                    continue
                log.regrade(trajectory.id, reward)
                counts["right" if reward.accuracy >= 1 else "wrong"] += 1
    return dict(counts)
