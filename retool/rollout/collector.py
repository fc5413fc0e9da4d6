"""The collector: problems in, groups of finished and scored trajectories out, through the rollout log.

One task a trajectory; nobody waits for anybody, except in deterministic mode, where the engine runs rounds in
lockstep and the whole step is committed at once.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from retool.config import Recipe
from retool.engines.base import Engine, ForkProbe, Sampling
from retool.engines.sampler import mix_seed
from retool.protocols.codec import Codec
from retool.records import Group, Problem, RewardResult, Trajectory
from retool.rewards.batch_scores import zscore_groups
from retool.rollout.episode import Episode, EpisodeSettings
from retool.rollout.groups import shuffle_scores
from retool.rollout.log import RolloutLog
from sandbox.types import Sandbox

_TRAIN, _EVAL = 1, 2  # streams of random numbers

Progress = Callable[[int, int], None]


class RolloutError(Exception):
    """Too much was lost to infrastructure to go on."""


class Scorer(Protocol):
    """What `retool.rewards.Rewarder` does."""

    async def score(self, trajectory: Trajectory) -> RewardResult: ...


class Collector:
    """`log` is needed by `collect`, not by `evaluate`. `counters` only ever grow."""

    def __init__(
        self,
        engine: Engine,
        sandbox: Sandbox,
        codec: Codec,
        rewarder: Scorer,
        recipe: Recipe,
        log: RolloutLog | None = None,
    ) -> None:
        self.engine = engine
        self.sandbox = sandbox
        self.codec = codec
        self.rewarder = rewarder
        self.recipe = recipe
        self.log = log
        self.counters: Counter[str] = Counter()
        self._semaphore: asyncio.Semaphore | None = None
        self._semaphore_loop: asyncio.AbstractEventLoop | None = None
        if recipe.deterministic and not engine.capabilities.deterministic:
            raise RolloutError("deterministic: true needs an engine in lockstep mode")

    async def collect(
        self,
        step: int,
        problems: Sequence[Problem],
        version: int,
        progress: Progress | None = None,
        first: int = 0,
    ) -> list[Group]:
        """The groups of a step, in the order of `problems`; group g is `{step}.{g}`, its members `{step}.{g}.{i}`.

        A step may be collected in several batches: the groups of a later one are numbered from `first` on. Groups that
        the log already holds are read, not sampled again (in deterministic mode: only when the whole batch is there,
        otherwise the step starts over). `version` is the policy version that new tokens are expected to
        have. Raises `RolloutError` when more than `rollout.max_failed_share` of the trajectories is lost; the step is
        then dropped from the log, so that a later run samples it anew.
        """
        if self.log is None:
            raise RolloutError("collect needs a rollout log")
        ids = [f"{step}.{first + g}" for g in range(len(problems))]
        done = {g.id: g for g in self._logged(step, ids, problems, first)}
        missing = [g for g, group_id in enumerate(ids) if group_id not in done]
        size = self.recipe.rollout.members
        tally = _Tally(total=len(ids) * size, limit=self.recipe.rollout.max_failed_share, progress=progress)
        tally.add(t for g in done.values() for t in g.trajectories)
        try:
            tally.check()
            if self.recipe.deterministic:
                fresh = []
                for wave in self._waves(missing, size):
                    fresh += await self._wave(step, first, wave, problems, tally)
                self.log.append_all(fresh)
            else:
                append = self.log.append
                fresh = await _gather([self._group(step, first + g, problems[g], tally, append) for g in missing])
        except RolloutError:
            self.log.drop_step(step)
            raise
        self._check_versions(fresh, version)
        done |= {g.id: g for g in fresh}
        groups = [done[i] for i in ids]
        groups = zscore_groups(groups) if self.recipe.reward.zscore == "batch" else groups
        return shuffle_scores(groups, self.recipe.seed, step) if self.recipe.reward.shuffle else groups

    async def evaluate(
        self,
        problems: Sequence[Problem],
        samples: int = 1,
        tool: bool = True,
        sampling: Sampling | None = None,
        progress: Progress | None = None,
    ) -> list[Trajectory]:
        """`samples` scored trajectories a problem, in order; nothing is logged.

        `sampling` defaults to the recipe's `eval` section. With `tool=False` the string that opens a call is banned.
        """
        sampling = sampling or eval_sampling(self.recipe, self.codec)
        if sampling.probe is not None and not self.engine.capabilities.probe:
            raise RolloutError("this engine cannot choose temperatures by position: leave out eval.fork_temperature")
        settings = EpisodeSettings.of(self.recipe, self.codec, tool, sampling)
        total = len(problems) * samples
        tally = _Tally(total, self.recipe.rollout.max_failed_share, progress)
        wanted = [(p, k) for p in range(len(problems)) for k in range(samples)]
        kind = "tool" if tool else "no_tool"
        gate = self._gate()

        async def one(p: int, k: int) -> Trajectory:
            name = f"eval.{kind}.{p}"
            seed = mix_seed(self.recipe.seed, _EVAL, int(tool), p, k)
            return await self._member(settings, f"{name}.{k}", problems[p], name, k, seed, gate, tally)

        if not self.engine.capabilities.deterministic:
            return await _gather([one(p, k) for p, k in wanted])
        found: list[Trajectory] = []
        for start in range(0, len(wanted), self._wave_slots()):
            wave = wanted[start : start + self._wave_slots()]
            self._expect(len(wave))
            found += await _gather([one(p, k) for p, k in wave])
        return found

    # -- groups ------------------------------------------------------------------------------------------------------

    async def _group(
        self, step: int, g: int, problem: Problem, tally: _Tally, commit: Callable[[Group], None] | None
    ) -> Group:
        settings = EpisodeSettings.of(self.recipe, self.codec, self.recipe.rollout.tool)
        group = f"{step}.{g}"
        seeds = [mix_seed(self.recipe.seed, _TRAIN, step, g, i) for i in range(self.recipe.rollout.members)]
        members = await _gather(
            [
                self._member(settings, f"{group}.{i}", problem, group, i, seed, self._gate(), tally)
                for i, seed in enumerate(seeds)
            ]
        )
        made = Group(group, step, problem, members)
        if commit is not None:
            commit(made)
        return made

    async def _wave(
        self, step: int, first: int, wave: Sequence[int], problems: Sequence[Problem], tally: _Tally
    ) -> list[Group]:
        self._expect(len(wave) * self.recipe.rollout.members)
        return await _gather([self._group(step, first + g, problems[g], tally, None) for g in wave])

    async def _member(
        self,
        settings: EpisodeSettings,
        id: str,
        problem: Problem,
        group: str,
        index: int,
        seed: int,
        gate: asyncio.Semaphore,
        tally: _Tally,
    ) -> Trajectory:
        async with gate:
            episode = Episode.start(
                self.engine,
                self.sandbox,
                self.codec,
                settings,
                self.counters,
                id=id,
                problem=problem,
                group=group,
                index=index,
                seed=seed,
            )
            trajectory = await episode.run()
        if trajectory.status != "aborted":
            trajectory.reward = await self.rewarder.score(trajectory)
            self.counters["unknown_rewards"] += int(trajectory.reward.accuracy is None)
        self.counters["trajectories"] += 1
        self.counters[f"status_{trajectory.status}"] += 1
        tally.add([trajectory])
        tally.check()
        return trajectory

    # -- lockstep, gates, the log ------------------------------------------------------------------------------------

    def _gate(self) -> asyncio.Semaphore:
        """Episodes in flight; in lockstep nobody may be held back, a round waits for everybody."""
        loop = asyncio.get_running_loop()
        if self._semaphore is None or self._semaphore_loop is not loop:
            wide = self.engine.capabilities.deterministic
            self._semaphore = asyncio.Semaphore(1 << 30 if wide else self.recipe.rollout.concurrency)
            self._semaphore_loop = loop
        return self._semaphore

    def _wave_slots(self) -> int:
        return self.recipe.engine.slots

    def _waves(self, groups: Sequence[int], size: int) -> list[Sequence[int]]:
        """Whole groups that fit into the engine's slots together."""
        each = self._wave_slots() // size
        if each < 1:
            raise RolloutError(
                f"deterministic: true needs engine.slots ({self._wave_slots()}) >= rollout.group_size ({size})"
                + (" x rollout.oversample" if self.recipe.rollout.oversample > 1 else "")
            )
        return [groups[i : i + each] for i in range(0, len(groups), each)]

    def _expect(self, n: int) -> None:
        expect = getattr(self.engine, "expect", None)
        if expect is not None:
            expect(n)

    def _logged(self, step: int, ids: Sequence[str], problems: Sequence[Problem], first: int) -> list[Group]:
        """What a run that was cut off left of this batch of the step."""
        assert self.log is not None
        present = self.log.group_ids(step)
        here = [i for i in present if i in set(ids)]
        dynamic = self.recipe.rollout.dynamic.kind != "none"
        if self.recipe.deterministic and (0 < len(here) < len(ids) or (present and not here and first == 0)):
            self.log.drop_step(step)
            if first:
                raise RolloutError(f"the log held part of a batch of step {step}; the step was dropped: --resume")
            return []
        groups = [self.log.read_group(i) for i in (here if dynamic else present)]
        for group in groups:
            if group.id not in ids or problems[ids.index(group.id)] != group.problem:
                raise RolloutError(
                    f"the rollout log {self.log.folder} holds group {group.id} for another problem "
                    f"({group.problem.id!r}); the recipe's problems changed: use another run folder"
                )
        return groups

    def _check_versions(self, groups: Sequence[Group], version: int) -> None:
        """Count tokens of another policy version than the caller announced."""
        for t in (t for g in groups for t in g.trajectories):
            self.counters["stale_turns"] += sum(
                any(v != version for _, v in s.versions) for s in t.transcript.policy_spans
            )


def eval_sampling(recipe: Recipe, codec: Codec) -> Sampling:
    """What `recipe.eval` says, the probe of temperatures at forking tokens included."""
    e = recipe.eval
    probe = None
    if e.fork_temperature is not None or e.rest_temperature is not None:
        probe = ForkProbe(
            e.temperature if e.fork_temperature is None else e.fork_temperature,
            e.temperature if e.rest_temperature is None else e.rest_temperature,
            e.fork_entropy,
            codec.protocol.call_open,
            codec.protocol.stop,
        )
    return Sampling(recipe.rollout.max_tokens, e.temperature, e.top_p, probe=probe)


class _Tally:
    """How far a step is, and how much of it is lost."""

    def __init__(self, total: int, limit: float, progress: Progress | None) -> None:
        self.total = total
        self.limit = limit
        self.progress = progress
        self.ended = 0
        self.aborted = 0
        self.unknown = 0
        self.reason = ""

    def add(self, trajectories: Any) -> None:
        for t in trajectories:
            self.ended += 1
            self.aborted += int(t.status == "aborted")
            self.unknown += int(t.status != "aborted" and not t.usable)
            self.reason = t.error or self.reason
            if self.progress is not None:
                self.progress(self.ended, self.total)

    def check(self) -> None:
        lost = self.aborted + self.unknown
        if lost > self.limit * self.total:
            raise RolloutError(
                f"{lost} of {self.total} trajectories are lost ({self.aborted} aborted, {self.unknown} with an unknown "
                f"reward), more than rollout.max_failed_share ({self.limit:g}) allows"
                + (f"; the last error: {self.reason}" if self.reason else "")
            )


async def _gather(work: Sequence[Awaitable[Any]]) -> list[Any]:
    """Results in order. The first exception cancels the rest, waits for them and is raised itself."""
    tasks = [asyncio.ensure_future(w) for w in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
