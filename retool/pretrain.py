"""Value pretraining: before the first step the policy is frozen and the critic learns what its answers are worth.

A rollout of the phase is collected like any other, with seeds of its own, into a folder of its own:

    out/pretrain/rollouts/        step 0: the held-out problems, sampled once; then one step a rollout
    out/pretrain/learner.jsonl    what the critic learnt from, and the metrics
    out/pretrain/checkpoints/     the critic after each evaluation; what an interrupted phase goes on from
    out/critic/                   the result, which another run may name: objective.critic.{kind: checkpoint, path}

The targets are Monte-Carlo returns (λ = γ = 1); whether the critic has learnt something general is judged by the
explained variance on problems it never saw (VC-PPO, 2503.01491; VAPO, 2504.05118).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from retool.config import Recipe
from retool.config.objective import PretrainConfig
from retool.engines.sampler import mix_seed
from retool.errors import UserError
from retool.learner import Learner
from retool.learner.batches import passes
from retool.learner.persist import with_moments
from retool.objectives.keyed import key_of
from retool.objectives.phases import value_pretraining
from retool.records import Problem, TrainSample
from retool.rollout.collector import Collector
from retool.rollout.groups import to_samples
from retool.rollout.log import RolloutLog
from retool.rollout.step_ledger import StepLedger
from retool.run_folder import RECIPE, RunFolder
from retool.workshop import Workshop

EXPLAINED, ERROR = "held_out/explained_variance", "held_out/value_error"
SMALLEST_GAIN = 1e-3
"""An evaluation improves on the best one when it is better by more than this."""
_STREAM = 0x7A1  # keeps the phase's random numbers apart from those of RL

PhaseCallback = Callable[[int, dict[str, float]], None]
Sampler = Callable[[int, Sequence[Problem]], Awaitable[list[TrainSample]]]


@dataclass(frozen=True)
class Split:
    """Problems to learn from, and problems to judge with."""

    train: list[Problem]
    held_out: list[Problem]


async def pretrain(
    recipe: Recipe, problems: Sequence[Problem], learner: Learner, workshop: Workshop, on_step: PhaseCallback | None
) -> list[dict[str, float]]:
    """Run (or finish) the phase; the learner's critic is then pretrained in place and saved in `out/critic`.

    Returns the metrics of each rollout, those of the held-out problems before the first one in front.
    """
    mine = phase_recipe(recipe)
    folder = RunFolder(mine, resume=(Path(mine.out) / RECIPE).exists())
    split = split_problems(problems, recipe.objective.critic.pretrain.held_out, recipe.rollout.prompts, recipe.seed)
    with RolloutLog(folder.rollouts) as log:
        collector = Collector(workshop.engine, workshop.sandbox, workshop.codec, workshop.rewarder, mine, log=log)

        async def sample(step: int, wanted: Sequence[Problem]) -> list[TrainSample]:
            groups = await collector.collect(step, wanted, learner.version)
            return to_samples(groups, 1, collector.counters)

        metrics = await pretrain_critic(mine, split, learner, sample, folder, on_step)
    learner.save_critic(Path(recipe.out) / "critic")
    return metrics


async def pretrain_critic(
    mine: Recipe,
    split: Split,
    learner: Learner,
    sample: Sampler,
    folder: RunFolder,
    on_step: PhaseCallback | None = None,
) -> list[dict[str, float]]:
    """The phase, whoever samples. Resumes from the newest checkpoint in `folder`."""
    plan = mine.objective.critic.pretrain
    phase = learner.phase(mine, value_pretraining(learner.objective))
    latest = folder.latest()
    if latest is not None:
        phase.load(latest[1])
    done = latest[0] if latest is not None else 0
    ledger = StepLedger(folder.ledger)
    ledger.truncate_after(done if latest is not None else -1)
    judges = await sample(0, split.held_out)
    if latest is None:
        ledger.plan(0, [s.id for s in judges])
        ledger.finish(0, judge(phase, judges))
    while done < plan.steps and not enough(scores_of(ledger), plan):
        done += 1
        count = mine.rollout.prompts
        picks = passes(len(split.train), done - 1, count, f"pretrain/{mine.seed}")
        samples = await sample(done, [split.train[i] for _, i in picks])
        ledger.plan(done, [s.id for s in samples])
        metrics = phase.step(samples)
        evaluated = done % plan.every == 0 or done == plan.steps
        if evaluated:
            metrics |= judge(phase, judges)
        ledger.finish(done, metrics)
        if evaluated:
            phase.save(folder.checkpoint(done))
            folder.prune()
        if on_step is not None:
            on_step(done, metrics)
    learner.state = with_moments(learner.state, phase.state)
    return [r.metrics for r in ledger.read() if r.metrics is not None]


def judge(phase: Learner, judges: list[TrainSample]) -> dict[str, float]:
    """Explained variance and half the mean squared error of the critic on held-out samples, in units of the reward."""
    batch, metrics = phase.measure(judges)
    action = batch["action"]
    gap = batch["return"][action] - batch["critic_value"][action]
    return {EXPLAINED: metrics["value/explained_variance"], ERROR: float(gap.square().mean() / 2)}


def scores_of(ledger: StepLedger) -> list[float]:
    """Held-out explained variance of every evaluation after training began."""
    return [float(r.metrics[EXPLAINED]) for r in ledger.read() if r.step > 0 and r.metrics and EXPLAINED in r.metrics]


def enough(scores: Sequence[float], plan: PretrainConfig) -> bool:
    """Whether the threshold was reached and the last `patience` evaluations did not improve on the best before."""
    if len(scores) <= plan.patience or max(scores) < plan.min_explained_variance or plan.min_explained_variance >= 1:
        return False
    before, last = scores[: -plan.patience], scores[-plan.patience :]
    return max(last) <= max(before) + SMALLEST_GAIN


def split_problems(problems: Sequence[Problem], share: float, most: int, seed: int) -> Split:
    """Held out: `share` of the problems, at least one, at most `most`; the rest to train on, in their order. Raises
    `UserError` when nothing would be left."""
    if len(problems) < 2:
        raise UserError("value pretraining needs at least two problems: one to train on and one to judge with")
    order = sorted(range(len(problems)), key=lambda i: key_of("held-out", seed, problems[i].id, i))
    wanted = min(len(problems) - 1, max(1, round(share * len(problems))))
    chosen = set(order[:wanted])
    judges = [problems[i] for i in order[: min(wanted, most)]]
    return Split([p for i, p in enumerate(problems) if i not in chosen], judges)


def phase_recipe(recipe: Recipe) -> Recipe:
    """The recipe that the phase runs with: its own folder and random numbers, a constant learning rate."""
    return recipe.model_copy(
        update={
            "out": str(Path(recipe.out) / "pretrain"),
            "seed": mix_seed(_STREAM, recipe.seed),
            "steps": max(1, recipe.objective.critic.pretrain.steps),
            "learner": recipe.learner.model_copy(update={"schedule": "constant"}),
        }
    )
