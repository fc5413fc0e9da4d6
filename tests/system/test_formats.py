"""One key switches the format: cold start, SFT, RL with the live sandbox and evaluation, in `fenced` and `hermes`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from retool.config import Recipe
from retool.models import load_tokenizer
from retool.protocols import Codec, build_protocol
from retool.recipe import load_recipe
from retool.rollout.log import RolloutLog
from retool.run_folder import ROLLOUTS
from retool.train import tags_of
from tests.system.runs import ledger, retool

TINY = "recipes/tiny.yaml"
SMALL = (
    "steps=2",
    "checkpoint_every=2",
    "data.problems.count=400",
    "data.tool_share=1.0",
    "sft.steps=40",
    "sft.batch_size=32",
    "eval.problems.count=6",
)


def codec_of(recipe: Recipe) -> Codec:
    return Codec(load_tokenizer(recipe.model, tags_of(recipe)), build_protocol(recipe.protocol))


@pytest.mark.parametrize("name", ["fenced", "hermes"])
def test_the_key_alone_switches_the_recipe(name: str, tmp_path: Path) -> None:
    keys = (f"protocol.name={name}", f"out={tmp_path / 'run'}", *SMALL)
    for command in (("data", "generate"), ("sft",)):
        done = retool(*command, TINY, *keys)
        assert done.returncode == 0, done.stderr
    model = tmp_path / "run" / "sft" / "model"
    rl = tmp_path / "rl"
    done = retool("train", TINY, *keys, f"out={rl}", f"model={{path: {model}}}")
    assert done.returncode == 0, done.stderr
    metrics = [row["metrics"] for row in ledger(rl) if "metrics" in row]
    assert len(metrics) == 2
    assert all(m["trained_equals_sampled"] == 1.0 and m["max_logprob_gap"] <= 1e-4 for m in metrics)
    recipe = load_recipe(TINY, [*keys, f"model={{path: {model}}}"])
    codec = codec_of(recipe)
    with RolloutLog(rl / ROLLOUTS, read_only=True) as log:
        played = [t for step in log.steps() for g in log.read_step(step) for t in g.trajectories]
    called = [t for t in played if any(s.origin == "tool" for s in t.transcript.spans)]
    assert called, "a model that has seen nothing but calls makes some"
    for t in called:
        spans = t.transcript.spans
        at = next(i for i, s in enumerate(spans) if s.origin == "tool")
        before = [i for s in spans[:at] for i in s.ids]
        assert codec.decode(before).endswith(codec.protocol.stop)
        assert spans[at].ids == codec.observation_ids(t.tool_calls[0].observation, before)
    for more, share in (((), None), (("--no-tool",), 0.0)):
        out = tmp_path / "figures.json"
        done = retool("eval", str(rl / "model"), TINY, *keys, "--out", str(out), *more)
        assert done.returncode == 0, done.stderr
        figures = json.loads(out.read_text())["figures"]
        assert figures["n"] == 6 and figures["dropped"] == 0
        assert share is None or figures["code_ratio"] == share


@pytest.mark.parametrize("name", ["fenced", "hermes"])
def test_the_key_alone_trains_from_scratch(name: str, tmp_path: Path) -> None:
    done = retool("train", TINY, f"protocol.name={name}", f"out={tmp_path / 'run'}", "steps=2")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model" / "config.json").exists()


def test_traces_in_tags_serve_fine_tuning_in_another_format(tmp_path: Path) -> None:
    keys = (f"out={tmp_path / 'run'}", "data.problems.count=40", "sft.steps=2", "sft.batch_size=4")
    assert retool("data", "generate", TINY, *keys).returncode == 0
    done = retool("sft", TINY, *keys, "protocol.name=hermes")
    assert done.returncode == 0, done.stderr


def test_keys_of_another_format_are_refused(tmp_path: Path) -> None:
    done = retool("train", TINY, "protocol.name=hermes", "protocol.code=[<run>,</run>]", f"out={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "protocol.code belongs to protocol.name=tags" in done.stderr
    assert not (tmp_path / "run").exists()
