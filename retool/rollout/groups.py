"""From groups to the learner's samples, and the control experiment that shuffles scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from retool.engines.sampler import mix_seed
from retool.records import Group, TrainSample, Trajectory
from retool.rollout.episode import VOID
from retool.transcript import Sample

_SHUFFLE = 0x5C07E5  # keeps this stream of random numbers apart from the others


def to_samples(groups: Sequence[Group], min_usable: int = 1, counters: Counter[str] | None = None) -> list[TrainSample]:
    """One sample a usable trajectory, in order of groups and indices.

    Lost members (aborted, reward unknown) are simply not there: they enter no statistics. Groups with fewer than
    `min_usable` usable members are dropped whole (2 for estimators that compare within the group) and counted as
    `small_groups`; members lost as `lost_members`.
    """
    counters = counters if counters is not None else Counter()
    samples: list[TrainSample] = []
    for group in groups:
        usable = [t for t in group.usable if t.transcript.n_action]
        counters["lost_members"] += len(group.trajectories) - len(usable)
        if len(usable) < max(min_usable, 1):
            counters["small_groups"] += 1
            continue
        samples.extend(to_sample(t) for t in usable)
    return samples


def to_sample(trajectory: Trajectory) -> TrainSample:
    """The whole trajectory behind its prompt, with the columns that objectives read."""
    reward = trajectory.reward
    if reward is None or reward.accuracy is None:
        raise ValueError(f"trajectory {trajectory.id} has no known reward")
    return TrainSample(
        id=trajectory.id,
        group=trajectory.group,
        sample=Sample.whole(trajectory.transcript),
        score=reward.score,
        accuracy=reward.accuracy,
        tool_error_rate=tool_error_rate(trajectory),
        void=VOID in trajectory.flags,
        truncated=trajectory.status.startswith("truncated"),
        problem=trajectory.problem.id,
        turn_rewards=reward.turn_rewards,
        tool_calls=len(trajectory.tool_calls),
        format_penalty=format_penalty(trajectory),
    )


def tool_error_rate(trajectory: Trajectory) -> float:
    """Share of calls that did not end well, malformed ones included; 0 without calls."""
    calls = trajectory.tool_calls
    return sum(not c.ok for c in calls) / len(calls) if calls else 0.0


def format_penalty(trajectory: Trajectory) -> float:
    """1 without an answer, else the answers beyond the first a turn, at most 1 (rStar2-Agent's penalty)."""
    if trajectory.reward is None or "no_answer" in trajectory.reward.flags:
        return 1.0
    text = trajectory.policy_text
    answers = max(text.count("<answer>"), text.count("\\boxed{"), 1)
    turns = len({s.turn for s in trajectory.transcript.spans if s.origin == "policy"})
    return min(1.0, (answers - 1) / max(turns, 1))


def shuffle_scores(groups: Sequence[Group], seed: int, step: int) -> list[Group]:
    """Copies of the groups with scores permuted over all usable trajectories of the step; accuracy stays.

    The permutation is a function of (seed, step) and of the ids, so it can be repeated from the log.
    """
    usable = sorted((t for g in groups for t in g.usable), key=lambda t: t.id)
    rng = np.random.default_rng(mix_seed(_SHUFFLE, seed, step))
    order = rng.permutation(len(usable))
    scores = {t.id: usable[j].reward.score for t, j in zip(usable, order) if usable[j].reward is not None}

    def shuffled(t: Trajectory) -> Trajectory:
        if t.id not in scores or t.reward is None:
            return t
        return replace(t, reward=replace(t.reward, score=scores[t.id]))

    return [replace(g, trajectories=[shuffled(t) for t in g.trajectories]) for g in groups]
