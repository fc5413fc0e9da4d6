"""Dynamic sampling: which groups are trained on, what is carried over, and what a killed run remembers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from retool.records import Group, Problem, RewardResult, Trajectory
from retool.rollout.dynamic import Draw, by_priority, mixed, problems_from, sampled_at, weight_key
from retool.rollout.log import RolloutLog
from retool.transcript import Span, Transcript
from tests.rollout.world import problem, recipe

PROBLEMS = [problem(f"Question {i}?", str(i), f"p{i}") for i in range(12)]


def group(id: str, task: Problem, accuracies: Sequence[float | None], version: int = 0) -> Group:
    """Members with given accuracies, their tokens of one policy version."""
    members = []
    for i, accuracy in enumerate(accuracies):
        said = Span("policy", (7, 8), logprobs=(-1.0, -1.0), versions=((0, version),))
        t = Trajectory(f"{id}.{i}", task, id, i, 0, Transcript([Span("prompt", (5,)), said]))
        t.reward = RewardResult(accuracy, accuracy or 0.0)
        members.append(t)
    return Group(id, int(id.split(".")[0]), task, members)


class Sampling:
    """Stands for the collector: problem pK gives a mixed group when K is in `mixed`; what was sampled is logged."""

    def __init__(self, folder: Path, teach: set[int]) -> None:
        self.log = RolloutLog(folder)
        self.teach = teach
        self.drawn: list[str] = []

    async def __call__(self, step: int, problems: Sequence[Problem], version: int, *, first: int = 0) -> list[Group]:
        done = set(self.log.group_ids(step))
        made = []
        for i, p in enumerate(problems):
            self.drawn.append(p.id)
            right = [1.0, 0.0] if int(p.id[1:]) in self.teach else [0.0, 0.0]
            made.append(group(f"{step}.{first + i}", p, right, version))
        self.log.append_all([g for g in made if g.id not in done])
        return made


Make = Callable[[str, set[int]], Sampling]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes `Sampling`s over logs of their own."""
    opened: list[Sampling] = []

    def made(name: str, teach: set[int]) -> Sampling:
        opened.append(Sampling(tmp_path / name, teach))
        return opened[-1]

    yield made
    for sampling in opened:
        sampling.log.close()


def dynamic(**keys: int | str) -> object:
    return recipe(rollout={"prompts": 3, "dynamic": {"kind": "accuracy", **keys}})


def test_groups_are_judged_on_raw_accuracy() -> None:
    """TV-DYN: b and d stay, although the scores of an all-right group may differ."""
    a, b, c, d = ([1.0, 1, 1, 1], [1.0, 0, 1, 0], [0.0, 0, 0, 0], [0.0, 0, 0, 1])
    assert [mixed(group("0.0", PROBLEMS[0], g)) for g in (a, b, c, d)] == [False, True, False, True]
    shaped = group("0.0", PROBLEMS[0], a)
    for t, score in zip(shaped.trajectories, (1.0, 1.0, 0.5, 0.0)):
        assert t.reward is not None
        t.reward = replace(t.reward, score=score)
    assert not mixed(shaped)
    assert not mixed(group("0.0", PROBLEMS[0], [1.0, None, None]))  # one valid member has nothing to compare with
    assert mixed(group("0.0", PROBLEMS[0], [1.0, None, 0.0]))
    lost = group("0.0", PROBLEMS[0], [1.0, 0.0])
    lost.trajectories[1].status = "aborted"
    assert not mixed(lost)


async def test_batches_are_drawn_until_enough_groups_teach(make: Make) -> None:
    sampling = make("log", set(range(0, 12, 2)))
    draw = Draw(dynamic(), PROBLEMS, sampling, sampling.log)  # type: ignore[arg-type]
    drawn = await draw.step(0, 0)
    assert len(drawn.groups) == 3 and all(mixed(g) for g in drawn.groups)
    assert [g.id for g in drawn.sampled] == [f"0.{i}" for i in range(len(drawn.sampled))]
    assert drawn.metrics["dynamic/batches"] == len(drawn.sampled) / 3
    assert drawn.metrics["dynamic/starved"] == 0 and drawn.metrics["dynamic/carried"] == 0
    # unfiltered: what accuracy is measured on holds the groups that were dropped too
    assert drawn.metrics["dynamic/mixed"] == sum(map(mixed, drawn.sampled)) / len(drawn.sampled)
    assert any(not mixed(g) for g in drawn.sampled)


async def test_a_pass_over_the_problems_skips_none_and_repeats_none(make: Make) -> None:
    sampling = make("log", {1, 5, 6})
    draw = Draw(dynamic(max_batches=2), PROBLEMS, sampling, sampling.log)  # type: ignore[arg-type]
    for step in range(6):
        await draw.step(step, step)
    for start in range(0, len(sampling.drawn) - 11, 12):
        assert sorted(sampling.drawn[start : start + 12]) == sorted(p.id for p in PROBLEMS)
    assert draw.cursor == len(sampling.drawn)


async def test_surplus_is_carried_while_it_is_fresh_and_discarded_otherwise(make: Make) -> None:
    everything = set(range(12))
    for staleness, expected in ((0, [0, 0, 0]), (1, [0, 3, 0]), (2, [0, 3, 3])):
        sampling = make(str(staleness), everything)
        r = dynamic(batch=9, max_staleness=staleness)
        draw = Draw(r, PROBLEMS, sampling, sampling.log)  # type: ignore[arg-type]
        steps = [await draw.step(step, step) for step in range(3)]
        assert [s.metrics["dynamic/from_before"] for s in steps] == expected
        trained = [g.id for s in steps for g in s.groups]
        assert len(trained) == len(set(trained)) == 9
        for step, s in enumerate(steps):
            assert all(step - sampled_at(g) <= staleness for g in s.groups)
    assert [g.id for g in steps[1].groups] == ["0.3", "0.4", "0.5"] and not steps[1].sampled


async def test_an_exhausted_budget_trains_with_what_there_is(make: Make) -> None:
    sampling = make("log", {0, 1})
    r = dynamic(max_batches=4)
    draw = Draw(r, PROBLEMS, sampling, sampling.log)  # type: ignore[arg-type]
    drawn = await draw.step(0, 0)
    assert len(drawn.groups) == 2 and drawn.metrics["dynamic/starved"] == 1 and drawn.metrics["dynamic/batches"] == 4
    barren = make("barren", set())
    nothing = await Draw(r, PROBLEMS, barren, barren.log).step(0, 0)  # type: ignore[arg-type]
    assert nothing.groups == [] and nothing.metrics["dynamic/starved"] == 3 and len(nothing.sampled) == 12


async def test_memory_brings_back_cursor_and_carried_groups(make: Make) -> None:
    r = dynamic(batch=4, max_staleness=2)
    whole = make("a", {0, 2, 3, 5, 7, 8, 11})
    draw = Draw(r, PROBLEMS, whole, whole.log)  # type: ignore[arg-type]
    wanted = []
    for step in range(6):
        wanted.append([g.id for g in (await draw.step(step, step)).groups])
    other = make("b", whole.teach)
    found: list[list[str]] = []
    memory = None
    for step in range(6):  # a new process each step
        draw = Draw(r, PROBLEMS, other, other.log, memory)  # type: ignore[arg-type]
        found.append([g.id for g in (await draw.step(step, step)).groups])
        memory = draw.memory()
    assert found == wanted and other.drawn == whole.drawn
    assert memory is not None and set(memory) == {"cursor", "carried"}


async def test_without_dynamic_sampling_a_step_is_a_slice_of_the_order(make: Make) -> None:
    sampling = make("log", set())
    r = recipe(rollout={"prompts": 3})
    draw = Draw(r, PROBLEMS, sampling, sampling.log)
    drawn = [await draw.step(step, step) for step in (5, 6)]
    assert sampling.drawn == [p.id for p in problems_from(PROBLEMS, 15, 6, r.seed)]
    assert draw.memory() is None and drawn[0].groups == drawn[0].sampled and drawn[0].metrics == {}


def test_priorities_are_drawn_without_replacement_by_weight() -> None:
    weights = {weight_key(p): 8.0 if p.id in ("p3", "p4") else 0.2 for p in PROBLEMS}
    counts = dict.fromkeys((p.id for p in PROBLEMS), 0)
    for step in range(400):
        picked = by_priority(PROBLEMS, weights, 4, (1, step, 0))
        assert len({p.id for p in picked}) == 4
        assert picked == by_priority(PROBLEMS, weights, 4, (1, step, 0))
        for p in picked:
            counts[p.id] += 1
    assert min(counts["p3"], counts["p4"]) > 3 * max(n for i, n in counts.items() if i not in ("p3", "p4"))
    uniform = [by_priority(PROBLEMS, {}, 4, (1, step, 0)) for step in range(600)]
    shares = [sum(p in picked for picked in uniform) / 600 for p in PROBLEMS]
    assert max(abs(s - 4 / 12) for s in shares) < 0.1
    seen = PROBLEMS[:8]
    assert {p.id for p in by_priority(PROBLEMS, {}, 4, (0, 0, 1), seen)} == {"p8", "p9", "p10", "p11"}
    assert len(by_priority(PROBLEMS[:2], {}, 5, (0, 0, 0))) == 5


def test_an_unseen_problem_counts_as_the_heaviest() -> None:
    weights = {weight_key(p): 0.01 for p in PROBLEMS[:-1]} | {weight_key(PROBLEMS[0]): 5.0}
    hits = sum(PROBLEMS[-1] in by_priority(PROBLEMS, weights, 2, (0, step, 0)) for step in range(200))
    assert hits > 150


def test_shuffled_scores_are_not_carried() -> None:
    with pytest.raises(ValueError, match=r"max_staleness must be 0"):
        recipe(reward={"shuffle": True}, rollout={"dynamic": {"kind": "accuracy", "max_staleness": 1}})
