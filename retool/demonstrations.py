"""Traces as the learner's samples: for supervised fine-tuning, and for imitation beside RL."""

from __future__ import annotations

from pathlib import Path

from data_gen import load_traces, trace_to_transcript
from retool.config import Recipe
from retool.protocols.codec import Codec
from retool.records import TrainSample
from retool.transcript import Sample


def default_traces(recipe: Recipe) -> Path:
    """Where `retool data generate` puts this recipe's traces and `retool sft` looks for them."""
    return Path(recipe.sft.data) if recipe.sft is not None and recipe.sft.data else Path(recipe.out) / "traces.jsonl"


def demonstrations(path: Path, codec: Codec) -> list[TrainSample]:
    """One sample a trace. Raises `DataError` for a missing or broken file."""
    return [
        TrainSample(id=t.id, group=t.id, sample=Sample.whole(trace_to_transcript(t, codec))) for t in load_traces(path)
    ]


def ptx_samples(recipe: Recipe, codec: Codec) -> list[TrainSample]:
    """The traces of `objective.ptx`; none when it is off."""
    ptx = recipe.objective.ptx
    if not ptx.coef:
        return []
    return demonstrations(Path(ptx.data) if ptx.data else default_traces(recipe), codec)
