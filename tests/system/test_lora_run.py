"""`model.lora` from the command line: cold start and RL, resume with equal bits, what reads a run reads such a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.system.runs import ledger, retool, weights

LORA = ("model.lora.rank=4", "reward.custom=tests.system.runs:by_digits", "learner.lr=1e-2")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps nobody disturbed."""
    out = tmp_path_factory.mktemp("lora") / "run"
    done = retool("train", "recipes/tiny.yaml", f"out={out}", "steps=6", *LORA)
    assert done.returncode == 0, done.stderr
    return out


def test_the_engine_samples_with_the_adapters(run: Path) -> None:
    metrics = [row["metrics"] for row in ledger(run) if "metrics" in row]
    assert len(metrics) == 6
    assert all(m["grad_norm/policy"] > 0 and m["max_logprob_gap"] <= 1e-4 for m in metrics)
    assert all(m["trained_equals_sampled"] == 1.0 for m in metrics)


def test_resume_ends_in_the_same_bits(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for steps, more in ((4, ()), (6, ("--resume",))):
        done = retool("train", "recipes/tiny.yaml", f"out={out}", f"steps={steps}", *LORA, *more)
        assert done.returncode == 0, done.stderr
    ours, theirs = weights(out), weights(run)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    a, b = (load_file(p / "adapter" / "adapter_model.safetensors") for p in (out, run))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert any(float(v.abs().sum()) > 0 for k, v in a.items() if "lora_B" in k)


def test_compare_and_eval_read_it(run: Path) -> None:
    done = retool("compare", str(run), "--objectives", "grpo,dapo,ppo_rlhf")
    assert done.returncode == 0, done.stderr
    done = retool("eval", str(run / "model"), "recipes/tiny.yaml", "--limit", "4")
    assert done.returncode == 0, done.stderr


def test_a_cold_start_with_adapters_is_an_ordinary_model(tmp_path: Path) -> None:
    common = [f"out={tmp_path}", "data.problems.count=40", "sft.steps=4", "sft.batch_size=8", *LORA]
    for command in (("data", "generate"), ("sft",)):
        done = retool(*command, "recipes/tiny.yaml", *common)
        assert done.returncode == 0, done.stderr
    assert not any("lora" in name for name in load_file(tmp_path / "sft" / "model" / "model.safetensors"))
    assert (tmp_path / "sft" / "adapter" / "adapter_config.json").exists()
    done = retool("sft", "recipes/tiny.yaml", *common, "sft.head=pointwise")
    assert done.returncode == 2 and "model.lora=null" in done.stderr
