"""Supervised fine-tuning on traces: the cold start before RL.

    retool sft recipes/demo.yaml [key=value ...] [--resume]

Loss on what the teacher wrote, never on what the interpreter answered (ReTool, section 3.1). The update is the
learner's, with the preset `sft`; each step's batch is a function of (seed, step), so an interrupted run goes on
exactly.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from data_gen import Trace, load_traces, trace_to_transcript
from retool.config import Recipe
from retool.errors import UserError
from retool.files import write_text
from retool.learner import Learner, sft_recipe
from retool.models import load_model, load_tokenizer
from retool.objectives import build_objective
from retool.protocols import build_protocol
from retool.protocols.codec import Codec
from retool.records import TrainSample
from retool.run_folder import RunFolder
from retool.train import StepCallback, set_threads, tags_of
from retool.transcript import Sample


@dataclass
class SftResult:
    """The folder with the model and the metrics of each step."""

    folder: RunFolder
    metrics: list[dict[str, float]] = field(default_factory=list)


def sft_stage(recipe: Recipe) -> Recipe:
    """The recipe of the SFT stage, in a folder of its own. Raises `UserError` when there is no `sft` section."""
    if recipe.sft is None:
        raise UserError("this recipe has no `sft` section; add one (steps, batch_size, lr) or use another recipe")
    return sft_recipe(recipe).model_copy(update={"out": str(Path(recipe.out) / "sft")})


def default_traces(recipe: Recipe) -> Path:
    """Where `retool data generate` puts this recipe's traces and `retool sft` looks for them."""
    return Path(recipe.sft.data) if recipe.sft is not None and recipe.sft.data else Path(recipe.out) / "traces.jsonl"


def batch_of_step(n: int, step: int, size: int, seed: int) -> list[tuple[int, int]]:
    """(pass, index) of a step's traces: passes over all of them, each in its own order."""
    out: list[tuple[int, int]] = []
    orders: dict[int, list[int]] = {}
    for i in range(step * size, (step + 1) * size):
        epoch, at = divmod(i, n)
        if epoch not in orders:
            orders[epoch] = list(range(n))
            random.Random(f"sft/{seed}/{epoch}").shuffle(orders[epoch])
        out.append((epoch, orders[epoch][at]))
    return out


def sft(recipe: Recipe, *, resume: bool = False, on_step: StepCallback | None = None) -> SftResult:
    """Train on the recipe's traces. Raises `UserError` for what the user can mend."""
    mine = sft_stage(recipe)
    set_threads(mine)
    assert mine.sft is not None
    tokenizer = load_tokenizer(mine.model, tags_of(mine))
    codec = Codec(tokenizer, build_protocol(mine.protocol))
    traces = load_traces(default_traces(recipe))
    model = load_model(mine.model, tokenizer, mine.seed)
    samples = [_sample(t, codec) for t in traces]
    learner = Learner.create(mine, build_objective(mine), model, tokenizer)
    folder = RunFolder(mine, resume=resume)
    result = SftResult(folder)
    latest = folder.latest()
    first = 0
    if latest is not None:
        first = latest[0]
        learner.load(latest[1])
        result.metrics = _read(folder.path / "metrics.jsonl")[:first]
    for step in range(first, mine.steps):
        rows = batch_of_step(len(samples), step, mine.sft.batch_size, mine.seed)
        metrics = learner.step([replace(samples[i], id=f"{epoch}/{samples[i].id}") for epoch, i in rows])
        result.metrics.append(metrics)
        if (step + 1) % mine.sft.checkpoint_every == 0 and step + 1 < mine.steps:
            _save(folder, learner, step + 1, result.metrics)
        if on_step is not None:
            on_step(step, metrics)
    _save(folder, learner, mine.steps, result.metrics)
    learner.save_model(folder.model)
    return result


def _sample(trace: Trace, codec: Codec) -> TrainSample:
    transcript = trace_to_transcript(trace, codec)
    return TrainSample(id=trace.id, group=trace.id, sample=Sample.whole(transcript))


def _save(folder: RunFolder, learner: Learner, done: int, metrics: Sequence[dict[str, float]]) -> None:
    write_text(folder.path / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in metrics))
    learner.save(folder.checkpoint(done))
    folder.prune()


def _read(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
