"""The RL loop: problems -> trajectories -> rollout log -> update -> new weights in the engine.

    retool train recipes/demo.yaml [key=value ...] [--resume]

A step is: take this step's problems; read from the rollout log what an interrupted run already sampled for it;
sample the rest; write the ordered sample ids to `learner.jsonl`; update; write the metrics; hand the engine the new
weights. The learner is thus a replayable function of the log: after a crash, steps that are complete in the log are
learnt again from it, from the last checkpoint on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from retool.config import Recipe
from retool.demonstrations import ptx_samples
from retool.errors import UserError
from retool.evaluate import evaluate, scorecard
from retool.learner import Learner
from retool.models import load_model, load_tokenizer
from retool.objectives import build_objective, priorities
from retool.pretrain import pretrain
from retool.problems import load_problems
from retool.protocols import build_protocol
from retool.protocols.codec import Codec
from retool.records import Group, Problem
from retool.rollout.collector import Collector
from retool.rollout.dynamic import Draw
from retool.rollout.groups import to_samples
from retool.rollout.log import RolloutLog
from retool.rollout.step_ledger import StepLedger
from retool.run_folder import RunFolder
from retool.workshop import Workshop, open_workshop

StepCallback = Callable[[int, dict[str, float]], None]


@dataclass
class TrainResult:
    """What a finished run leaves: where the model is, the metrics of each step, evaluations by steps done; metrics of
    each rollout of the value pretraining, if this call ran it."""

    folder: RunFolder
    metrics: list[dict[str, float]] = field(default_factory=list)
    evaluations: dict[int, dict[str, Any]] = field(default_factory=dict)
    pretraining: list[dict[str, float]] = field(default_factory=list)


def set_threads(recipe: Recipe) -> None:
    """One thread in deterministic mode, else what the recipe says, else every core. Raises `UserError` under torchrun,
    where every rank would sample and write for itself."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("this command runs in one process so far; start it without torchrun")
    threads = recipe.learner.threads or (1 if recipe.deterministic else os.cpu_count() or 1)
    torch.set_num_threads(threads)
    if recipe.deterministic:
        torch.use_deterministic_algorithms(True)


async def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    on_step: StepCallback | None = None,
    on_pretrain: StepCallback | None = None,
) -> TrainResult:
    """Run all steps, after the value pretraining where the recipe has one (`on_pretrain` sees its rollouts). Raises
    `UserError` for what the user can mend, `SandboxError` where no sandbox can be had."""
    set_threads(recipe)
    problems = load_problems(recipe.problems)
    tokenizer = load_tokenizer(recipe.model, tags_of(recipe))
    model = load_model(recipe.model, tokenizer, recipe.seed)
    demos = ptx_samples(recipe, Codec(tokenizer, build_protocol(recipe.protocol)))
    learner = Learner.create(recipe, build_objective(recipe), model, tokenizer, demos=demos)
    folder = RunFolder(recipe, resume=resume)  # the last thing that can refuse: nothing is half-written
    latest = folder.latest()
    if latest is not None:
        learner.load(latest[1])
    first = latest[0] if latest is not None else 0
    result = TrainResult(folder)
    with RolloutLog(folder.rollouts) as log:
        ledger = StepLedger(folder.ledger)
        ledger.truncate_after(first - 1)
        result.metrics = [r.metrics for r in ledger.read() if r.metrics is not None]
        async with open_workshop(recipe, learner.policy.model, tokenizer, lockstep=recipe.deterministic) as workshop:
            await workshop.engine.sync(None, learner.version)
            if latest is None and recipe.objective.critic.pretrain.steps:
                result.pretraining = await pretrain(recipe, problems, learner, workshop, on_pretrain)
                learner.save(folder.checkpoint(0))
            loop = _Loop(recipe, problems, learner, workshop, log, ledger)
            for step in range(first, recipe.steps):
                metrics = await loop.step(step)
                result.metrics.append(metrics)
                done = step + 1
                if done % recipe.checkpoint_every == 0 or done == recipe.steps:
                    learner.save(folder.checkpoint(done))
                    folder.prune()
                if recipe.eval.every and done % recipe.eval.every == 0 and recipe.eval.problems is not None:
                    held_out = load_problems(recipe.eval.problems)
                    result.evaluations[done] = scorecard(await evaluate(workshop, recipe, held_out))
                if on_step is not None:
                    on_step(step, metrics)
    learner.save_model(folder.model)
    if recipe.model.lora is not None:
        learner.save_adapter(folder.adapter)
    return result


class _Loop:
    """The parts of one run and what happens in a step."""

    def __init__(
        self,
        recipe: Recipe,
        problems: Sequence[Problem],
        learner: Learner,
        workshop: Workshop,
        log: RolloutLog,
        ledger: StepLedger,
    ) -> None:
        self.recipe, self.problems, self.learner, self.workshop = recipe, problems, learner, workshop
        self.log, self.ledger = log, ledger
        self.collector = Collector(
            workshop.engine, workshop.sandbox, workshop.codec, workshop.rewarder, recipe, log=log
        )
        self.min_usable = 2 if learner.objective.structure.kind == "group" else 1
        records = ledger.read()
        self.draw = Draw(recipe, problems, self.collector.collect, log, records[-1].memory if records else None)

    async def step(self, step: int) -> dict[str, float]:
        """Sample, learn, hand the engine the new weights. A step that dynamic sampling leaves without a single group
        counts, but changes no weight."""
        drawn = await self.draw.step(step, self.learner.version, problem_weights(self.learner))
        counters = self.collector.counters
        samples = to_samples(drawn.groups, self.min_usable, counters)
        self.ledger.plan(step, [s.id for s in samples], self.draw.memory())
        metrics = {**rollout_metrics(drawn.sampled), **drawn.metrics}
        if (rest := getattr(self.workshop.engine, "rest", None)) is not None:
            await rest()
        nothing = not samples and self.recipe.rollout.dynamic.kind != "none"
        metrics |= {"updates": 0.0, "version": float(self.learner.version)} if nothing else self.learner.step(samples)
        metrics.update({f"count/{name}": float(n) for name, n in counters.items()})
        metrics.update({f"count/verifier_{k}": float(n) for k, n in self.workshop.rewarder.counters.items()})
        self.ledger.finish(step, metrics)
        await self.workshop.engine.sync(None, self.learner.version)
        return metrics


def problem_weights(learner: Learner) -> Mapping[str, float] | None:
    """Priorities of problems (`retool.rollout.dynamic.weight_key`), from what the objective remembers; empty where it
    keeps none: all are equal."""
    return None if learner.recipe.rollout.priority == "none" else priorities(learner.state)


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Accuracy, reward and tool use of a step's trajectories, all and (`family/...`) by problem family."""
    trajectories = [t for g in groups for t in g.trajectories]
    stats = scorecard(trajectories)
    low, high = stats.pop("ci95")
    families = stats.pop("by_family")
    scores = [t.reward.score for t in trajectories if t.usable and t.reward is not None]
    by_family = {
        f"family/{family}/{key}": float(figures[key])
        for family, figures in families.items()
        for key in ("accuracy", "code_ratio")
        if len(families) > 1 and key in figures
    }
    return {
        **by_family,
        **{f"rollout/{k}": float(v) for k, v in stats.items()},
        "rollout/accuracy_low": low,
        "rollout/accuracy_high": high,
        "rollout/score": sum(scores) / len(scores) if scores else float("nan"),
    }


def tags_of(recipe: Recipe) -> tuple[str, ...]:
    """The tags that a from-scratch tokenizer gets as single tokens."""
    return build_protocol(recipe.protocol).single
