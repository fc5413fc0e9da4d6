"""Groups through the log: whole, in order, repeatable; what is lost is counted and never scored."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from retool.engines.base import Sampling
from retool.engines.scripted import ScriptedEngine
from retool.engines.transformers_engine import TransformersEngine
from retool.models import tiny_model, tiny_tokenizer
from retool.records import RewardResult, Trajectory
from retool.rewards.rewarder import Rewarder
from retool.rollout.collector import Collector, RolloutError
from retool.rollout.groups import shuffle_scores, to_samples
from retool.rollout.log import RolloutLog
from sandbox.types import SandboxUnavailable
from tests.rollout.world import PythonBox, codec_of, problem, recipe

TOK = tiny_tokenizer()
PROBLEMS = [problem(f"What is {a}*7?", str(a * 7), f"p{a}") for a in range(2, 6)]


def solver(prompt: str, turn: int, said: str) -> str:
    """Calls the tool and repeats what it says."""
    if turn == 0:
        return f"<code>print({prompt.split('What is ')[1].split('?')[0]})</code>"
    return f"<answer>{said.split('<interpreter>')[1].split('</interpreter>')[0]}</answer>"


class World:
    """Collector and its parts in one place."""

    def __init__(self, folder: Path, rewarder: Rewarder, r: Any = None, engine: Any = None) -> None:
        self.recipe = r or recipe()
        self.engine = engine or ScriptedEngine(TOK, solver, delay=0.001)
        self.box = PythonBox()
        self.log = RolloutLog(folder)
        self.collector = Collector(self.engine, self.box, codec_of(self.recipe), rewarder, self.recipe, self.log)


@pytest.fixture
async def rewarder() -> Any:
    r = recipe()
    async with Rewarder(r.reward, codec_of(r).protocol) as it:
        yield it


async def test_groups_come_back_whole_scored_and_in_order(tmp_path: Path, rewarder: Rewarder) -> None:
    w = World(tmp_path, rewarder)
    seen: list[tuple[int, int]] = []
    groups = await w.collector.collect(5, PROBLEMS, 0, progress=lambda done, total: seen.append((done, total)))
    assert [g.id for g in groups] == ["5.0", "5.1", "5.2", "5.3"]
    assert [t.id for t in groups[1].trajectories] == ["5.1.0", "5.1.1"]
    assert all(t.reward.accuracy == 1 and t.status == "finished" for g in groups for t in g.trajectories)
    assert seen == [(i, 8) for i in range(1, 9)]
    assert w.log.read_step(5) == groups
    c = w.collector.counters
    assert (c["trajectories"], c["calls"], c["infra_failures"], c["unknown_rewards"], c["stale_turns"]) == (
        8,
        8,
        0,
        0,
        0,
    )
    samples = to_samples(groups, min_usable=2)
    assert [s.id for s in samples][:3] == ["5.0.0", "5.0.1", "5.1.0"] and samples[0].score == 1
    w.log.close()


async def test_seeds_and_ids_depend_on_place_alone(tmp_path: Path, rewarder: Rewarder) -> None:
    w = World(tmp_path / "a", rewarder)
    other = World(tmp_path / "b", rewarder, recipe(rollout={"concurrency": 1}))
    seeds = [
        [t.seed for g in await x.collector.collect(1, PROBLEMS[:2], 0) for t in g.trajectories] for x in (w, other)
    ]
    assert seeds[0] == seeds[1] and len(set(seeds[0])) == 4
    again = [t.seed for g in await w.collector.collect(2, PROBLEMS[:2], 0) for t in g.trajectories]
    assert set(again).isdisjoint(seeds[0])
    w.log.close()
    other.log.close()


async def test_a_step_cut_off_is_completed_not_repeated(tmp_path: Path, rewarder: Rewarder) -> None:
    w = World(tmp_path, rewarder)
    first = await w.collector.collect(0, PROBLEMS, 0)
    w.log.drop_step(0)
    for g in (first[2], first[0]):
        w.log.append(g)
    runs = len(w.box.runs)
    w.box._known.clear()
    groups = await w.collector.collect(0, PROBLEMS, 0)
    assert [g.id for g in groups] == [g.id for g in first] and len(w.box.runs) == runs + 4
    for old, new in zip(first, groups):
        assert [t.transcript.ids for t in old.trajectories] == [t.transcript.ids for t in new.trajectories]
    with pytest.raises(RolloutError, match="another problem"):
        await w.collector.collect(0, PROBLEMS[::-1], 0)
    w.log.close()


async def test_failures_of_ours_are_dropped_and_counted(tmp_path: Path, rewarder: Rewarder) -> None:
    w = World(tmp_path, rewarder)
    w.engine.failures = 3  # 1 + 2 retries, all of them of the first trajectory when episodes run one by one
    w.collector.recipe = w.recipe.model_copy(update={"rollout": w.recipe.rollout.model_copy(update={"concurrency": 1})})
    groups = await w.collector.collect(0, PROBLEMS, 0)
    lost = [t for g in groups for t in g.trajectories if t.status == "aborted"]
    assert len(lost) == 1 and lost[0].reward is None and w.collector.counters["infra_failures"] == 1
    counters = w.collector.counters
    samples = to_samples(groups, min_usable=2, counters=counters)
    assert len(samples) == 6 and counters["small_groups"] == 1 and counters["lost_members"] == 1
    assert len(to_samples(groups)) == 7
    assert w.log.read_step(0) == groups
    w.log.close()


async def test_too_many_failures_stop_the_run_and_leave_nothing(tmp_path: Path, rewarder: Rewarder) -> None:
    w = World(tmp_path, rewarder)
    w.box.faults = [SandboxUnavailable("the supervisor is gone")] * 1000
    with pytest.raises(RolloutError, match=r"max_failed_share.*the supervisor is gone"):
        await w.collector.collect(0, PROBLEMS, 0)
    assert w.log.steps() == []
    w.box.faults = []
    assert len(await w.collector.collect(0, PROBLEMS, 0)) == 4
    w.log.close()


class Undecided:
    """A verifier that cannot decide about even answers."""

    async def score(self, trajectory: Trajectory) -> RewardResult:
        return RewardResult(None if trajectory.index % 2 == 0 else 1.0, 0.5)


async def test_unknown_rewards_are_kept_but_not_trained_on(tmp_path: Path) -> None:
    w = World(tmp_path, Undecided())  # type: ignore[arg-type]
    groups = await w.collector.collect(0, PROBLEMS, 0)
    assert w.collector.counters["unknown_rewards"] == 4
    assert [s.id for s in to_samples(groups)] == [f"0.{g}.1" for g in range(4)]
    assert to_samples(groups, min_usable=2) == []
    w.log.regrade("0.0.0", RewardResult(1.0, 1.0))
    assert len(to_samples(w.log.read_step(0))) == 5
    w.log.close()


async def test_bugs_are_loud(tmp_path: Path, rewarder: Rewarder) -> None:
    w = World(tmp_path, rewarder, engine=ScriptedEngine(TOK, {"What is 2": ["x"]}))
    with pytest.raises(LookupError, match="no turn 0"):
        await w.collector.collect(0, PROBLEMS, 0)
    assert len(asyncio.all_tasks()) == 1
    w.log.close()


async def test_shuffled_scores_are_a_permutation_that_can_be_repeated(tmp_path: Path, rewarder: Rewarder) -> None:
    r = recipe(reward={"shuffle": True}, rollout={"group_size": 8})

    def sometimes(prompt: str, turn: int, said: str) -> str:
        return f"<answer>{14 if '2*7' in prompt else 0}</answer>"

    w = World(tmp_path, rewarder, r, ScriptedEngine(TOK, sometimes))
    groups = await w.collector.collect(3, PROBLEMS, 0)
    raw = w.log.read_step(3)
    shuffled = [[t.reward.score for t in g.trajectories] for g in groups]
    assert [[t.reward.score for t in g.trajectories] for g in raw] == [[1] * 8, [0] * 8, [0] * 8, [0] * 8]
    assert sum(map(sum, shuffled)) == 8 and shuffled[0] != [1] * 8
    assert [t.reward.accuracy for t in groups[0].trajectories] == [1] * 8
    assert shuffle_scores(raw, r.seed, 3) == groups == await w.collector.collect(3, PROBLEMS, 0)
    assert shuffle_scores(raw, r.seed, 4) != groups
    w.log.close()


async def test_evaluation_needs_no_log(rewarder: Rewarder) -> None:
    r = recipe()
    collector = Collector(ScriptedEngine(TOK, solver), PythonBox(), codec_of(r), rewarder, r)
    done = await collector.evaluate(PROBLEMS, samples=2, tool=True, sampling=Sampling(100, temperature=0))
    assert [(t.problem.id, t.index) for t in done] == [(p.id, k) for p in PROBLEMS for k in range(2)]
    assert all(t.reward.accuracy == 1 for t in done) and len({t.id for t in done}) == 8
    with pytest.raises(RolloutError, match="needs a rollout log"):
        await collector.collect(0, PROBLEMS, 0)


# -- with a real model ------------------------------------------------------------------------------------------------


def embedded(r: Any) -> TransformersEngine:
    model = tiny_model(r.model.tiny, len(TOK), 1, TOK.eos_token_id, TOK.pad_token_id).eval()
    return TransformersEngine(model, TOK, slots=r.engine.slots, lockstep=r.deterministic)


TINY = {"tiny": {"hidden": 32, "layers": 1, "heads": 2, "intermediate": 32, "context": 128}}


async def test_without_the_tool_the_call_is_never_opened(rewarder: Rewarder) -> None:
    r = recipe(model=TINY)
    engine = embedded(r)
    collector = Collector(engine, PythonBox(), codec_of(r), rewarder, r)
    done = await collector.evaluate(PROBLEMS, samples=4, tool=False, sampling=Sampling(60, temperature=1.5))
    assert done and all("<code>" not in t.policy_text and not t.tool_calls for t in done)
    free = await collector.evaluate(PROBLEMS, samples=4, sampling=Sampling(60, temperature=1.5))
    assert any("<code>" in t.policy_text for t in free)
    await engine.close()


@pytest.mark.parametrize("slots", [16, 5])
async def test_deterministic_waves_are_equal_and_committed_whole(
    tmp_path: Path, rewarder: Rewarder, slots: int
) -> None:
    r = recipe(deterministic=True, model=TINY, engine={"slots": slots}, rollout={"max_tokens": 40})
    found = []
    for run in range(2):
        engine = embedded(r)
        w = World(tmp_path / str(run), rewarder, r, engine)
        groups = await w.collector.collect(0, PROBLEMS, 0)
        if run:  # an unfinished wave is sampled again whole
            w.log.drop_step(0)
            w.log.append(groups[1])
            groups = await w.collector.collect(0, PROBLEMS, 0)
        found.append([(t.id, t.transcript, t.status) for g in groups for t in g.trajectories])
        assert w.log.group_ids(0) == [f"0.{g}" for g in range(4)]
        w.log.close()
        await engine.close()
    assert [(i, t.spans, s) for i, t, s in found[0]] == [(i, t.spans, s) for i, t, s in found[1]]


async def test_deterministic_needs_a_lockstep_engine_with_room(tmp_path: Path, rewarder: Rewarder) -> None:
    r = recipe(deterministic=True, model=TINY, engine={"slots": 1})
    with pytest.raises(RolloutError, match="lockstep"):
        Collector(ScriptedEngine(TOK, solver), PythonBox(), codec_of(r), rewarder, r)
    w = World(tmp_path / "b", rewarder, r, embedded(r))
    with pytest.raises(RolloutError, match=r"engine\.slots \(1\) >= rollout\.group_size \(2\)"):
        await w.collector.collect(0, PROBLEMS, 0)
    await w.engine.close()
    w.log.close()


async def test_a_step_in_several_batches_numbers_its_groups_on(tmp_path: Path, rewarder: Rewarder) -> None:
    w = World(tmp_path, rewarder, recipe(rollout={"oversample": 2, "dynamic": {"kind": "accuracy"}}))
    first = await w.collector.collect(0, PROBLEMS[:2], 0)
    second = await w.collector.collect(0, PROBLEMS[2:], 0, first=2)
    assert [g.id for g in (*first, *second)] == w.log.group_ids(0) == ["0.0", "0.1", "0.2", "0.3"]
    assert [t.id for t in second[0].trajectories] == [f"0.2.{i}" for i in range(4)]  # 2 x group_size
    seeds = [t.seed for g in (*first, *second) for t in g.trajectories]
    assert len(set(seeds)) == len(seeds) == 16
    runs = len(w.box.runs)
    assert await w.collector.collect(0, PROBLEMS[2:], 0, first=2) == second
    assert await w.collector.collect(0, PROBLEMS[:2], 0) == first and len(w.box.runs) == runs
    w.log.close()


async def test_deterministic_batches_are_read_back_one_by_one(tmp_path: Path, rewarder: Rewarder) -> None:
    rollout = {"max_tokens": 40, "dynamic": {"kind": "accuracy"}}
    r = recipe(deterministic=True, model=TINY, rollout=rollout)
    engine = embedded(r)
    w = World(tmp_path, rewarder, r, engine)
    first = await w.collector.collect(0, PROBLEMS[:2], 0)
    second = await w.collector.collect(0, PROBLEMS[2:], 0, first=2)
    sampled = w.collector.counters["trajectories"]
    assert await w.collector.collect(0, PROBLEMS[:2], 0) == first
    assert await w.collector.collect(0, PROBLEMS[2:], 0, first=2) == second
    assert w.collector.counters["trajectories"] == sampled
    w.log.drop_step(0)  # killed between the batches: the second is sampled again, in the same bits
    w.log.append_all(first)
    again = await w.collector.collect(0, PROBLEMS[2:], 0, first=2)
    assert [t.transcript.spans for g in again for t in g.trajectories] == [
        t.transcript.spans for g in second for t in g.trajectories
    ]
    w.log.close()
    await engine.close()
