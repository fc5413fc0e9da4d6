"""One key switches the format: cold start, SFT, RL with the live sandbox and evaluation, in `fenced` and `hermes`."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from retool.data_command import generate_data
from retool.demo import evaluate_stage, with_model
from retool.models import load_tokenizer
from retool.protocols import Codec, build_protocol
from retool.recipe import load_recipe
from retool.rollout.log import RolloutLog
from retool.sft import sft
from retool.train import tags_of, train
from tests.system.runs import retool

TINY = "recipes/tiny.yaml"
SMALL = (
    "steps=2",
    "checkpoint_every=2",
    "deterministic=false",
    "data.problems.count=200",
    "data.tool_share=1.0",
    "sft.steps=240",
    "sft.batch_size=32",
    "eval.problems.count=12",
)


@pytest.mark.parametrize("name", ["fenced", "hermes"])
def test_the_key_alone_switches_the_recipe(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(TINY, [f"protocol.name={name}", f"out={tmp_path}", *SMALL])
    generate_data(recipe)
    taught = with_model(recipe, sft(recipe).folder.model).model_copy(update={"out": str(tmp_path / "rl")})
    trained = asyncio.run(train(taught))
    assert len(trained.metrics) == 2
    assert all(m["trained_equals_sampled"] == 1.0 and m["max_logprob_gap"] <= 1e-4 for m in trained.metrics)
    codec = Codec(load_tokenizer(taught.model, tags_of(taught)), build_protocol(taught.protocol))
    with RolloutLog(trained.folder.rollouts, read_only=True) as log:
        played = [t for step in log.steps() for g in log.read_step(step) for t in g.trajectories]
    called = [t for t in played if any(s.origin == "tool" for s in t.transcript.spans)]
    assert called, "a model that has seen nothing but calls makes some"
    for t in called:
        spans = t.transcript.spans
        at = next(i for i, s in enumerate(spans) if s.origin == "tool")
        before = [i for s in spans[:at] for i in s.ids]
        assert codec.decode(before).endswith(codec.protocol.stop)
        assert spans[at].ids == codec.observation_ids(t.tool_calls[0].observation, before)
    answers = evaluate_stage(with_model(taught, trained.folder.model), "rl")
    assert all(t.status != "aborted" for arm in answers.values() for t in arm)
    assert any(t.tool_calls for t in answers["tool"])
    assert not any(t.tool_calls or codec.protocol.call_open in t.policy_text for t in answers["no_tool"])


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
