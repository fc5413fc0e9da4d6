"""Supervised fine-tuning on traces: the cold start before RL.

    retool sft recipes/demo.yaml [key=value ...] [--resume]

Loss on what the teacher wrote, never on what the interpreter answered (ReTool, section 3.1). The update is the
learner's, with the preset `sft`; each step's batch is a function of (seed, step), so an interrupted run goes on
exactly. With `sft.head` the same loop trains a reward model instead: see `retool/reward_model.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from retool.config import Recipe
from retool.demonstrations import default_traces, demonstrations
from retool.errors import UserError
from retool.files import write_text
from retool.learner import Learner, sft_recipe
from retool.learner.batches import passes
from retool.models import load_model, load_tokenizer
from retool.objectives import build_objective
from retool.protocols import build_protocol
from retool.protocols.codec import Codec
from retool.records import TrainSample
from retool.reward_model import batch_of, held_out_accuracy, reward_data, reward_learner
from retool.run_folder import RunFolder
from retool.train import StepCallback, set_threads, tags_of


@dataclass
class SftResult:
    """The folder with the model and the metrics of each step. `held_out`: of a reward model, the share of held-out
    pairs (or samples) that it gets right."""

    folder: RunFolder
    metrics: list[dict[str, float]] = field(default_factory=list)
    held_out: float | None = None


def sft_stage(recipe: Recipe) -> Recipe:
    """The recipe of the SFT stage, in a folder of its own. Raises `UserError` when there is no `sft` section."""
    if recipe.sft is None:
        raise UserError("this recipe has no `sft` section; add one (steps, batch_size, lr) or use another recipe")
    out = "sft" if recipe.sft.head == "language" else "reward_model"
    return sft_recipe(recipe).model_copy(update={"out": str(Path(recipe.out) / out)})


def sft(recipe: Recipe, *, resume: bool = False, on_step: StepCallback | None = None) -> SftResult:
    """Train on the recipe's traces. Raises `UserError` for what the user can mend."""
    mine = sft_stage(recipe)
    set_threads(mine)
    assert mine.sft is not None
    tokenizer = load_tokenizer(mine.model, tags_of(mine))
    codec = Codec(tokenizer, build_protocol(mine.protocol))
    stage = _language if mine.sft.head == "language" else _reward_model
    learner, batch_of_step, judge = stage(mine, recipe, tokenizer, codec)
    folder = RunFolder(mine, resume=resume)
    result = SftResult(folder)
    latest = folder.latest()
    first = 0
    if latest is not None:
        first = latest[0]
        learner.load(latest[1])
        result.metrics = _read(folder.path / "metrics.jsonl")[:first]
    for step in range(first, mine.steps):
        metrics = learner.step(batch_of_step(step))
        result.metrics.append(metrics)
        if (step + 1) % mine.sft.checkpoint_every == 0 and step + 1 < mine.steps:
            _save(folder, learner, step + 1, result.metrics)
        if on_step is not None:
            on_step(step, metrics)
    _save(folder, learner, mine.steps, result.metrics)
    if mine.sft.head == "language":
        learner.save_model(folder.model)
        if mine.model.lora is not None:
            learner.save_adapter(folder.adapter)
    else:
        learner.save_critic(folder.model, "reward_model")
    result.held_out = judge()
    return result


Stage = tuple[Learner, Callable[[int], list[TrainSample]], Callable[[], float | None]]


def _language(mine: Recipe, recipe: Recipe, tokenizer: Any, codec: Codec) -> Stage:
    """(learner, the samples of a step, nothing to judge with)."""
    assert mine.sft is not None
    samples = demonstrations(default_traces(recipe), codec)
    learner = Learner.create(mine, build_objective(mine), load_model(mine.model, tokenizer, mine.seed), tokenizer)
    size = mine.sft.batch_size

    def batch(step: int) -> list[TrainSample]:
        rows = passes(len(samples), step, size, f"sft/{mine.seed}")
        return [replace(samples[i], id=f"{epoch}/{samples[i].id}") for epoch, i in rows]

    return learner, batch, lambda: None


def _reward_model(mine: Recipe, recipe: Recipe, tokenizer: Any, codec: Codec) -> Stage:
    """(learner, the samples of a step, accuracy on held-out pairs or samples)."""
    assert mine.sft is not None and mine.sft.head != "language"
    if mine.model.lora is not None:
        raise UserError("a reward model is trained whole: add model.lora=null")
    head, size = mine.sft.head, mine.sft.batch_size
    data = reward_data(recipe, codec)
    learner = reward_learner(mine, load_model(mine.model, tokenizer, mine.seed), tokenizer)

    def batch(step: int) -> list[TrainSample]:
        return batch_of(data.train, [i for _, i in passes(len(data.train), step, size, f"reward/{mine.seed}")])

    return learner, batch, lambda: held_out_accuracy(learner, data.held_out, head)


def _save(folder: RunFolder, learner: Learner, done: int, metrics: Sequence[dict[str, float]]) -> None:
    write_text(folder.path / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in metrics))
    learner.save(folder.checkpoint(done))
    folder.prune()


def _read(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
