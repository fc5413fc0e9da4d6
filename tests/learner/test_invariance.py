"""Micro-batch size, layout, rank count and order cannot change loss or gradients (float64, 1e-6)."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from retool.learner.checkpoint import module_tensors
from retool.learner.value_model import read_value_model
from retool.objectives import PRESETS
from tests.learner.build_runs import PRESET_NAMES, PROOFS, busy_ppo, keeper, losses, rollout_for

CORE = (*PRESET_NAMES, *PROOFS)
REST = tuple(name for name in PRESETS if name not in CORE)
ALL = (*CORE, *REST)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert any(float(g.abs().max()) > 1e-6 for g in a.values())
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ALL)
def test_micro_batches_and_layouts(name: str, tmp_path: Path) -> None:
    rows = rollout_for(name)
    whole = keeper(name, tmp_path)
    expected = losses(whole.step(rows))
    assert any(abs(v) > 1e-6 for v in expected.values())
    every = [(layout, most) for layout in ("padded", "packed") for most in (1, 2, 4, None)]
    for layout, most in every if name in CORE else (("packed", 3),):
        other = keeper(name, tmp_path, layout=layout, micro_samples=most)
        assert losses(other.step(rows)) == pytest.approx(expected, abs=1e-6)
        assert_same(whole.gradients, other.gradients)


@pytest.mark.parametrize("name", ALL)
def test_order_of_arrival(name: str, tmp_path: Path) -> None:
    rows = rollout_for(name)
    first = keeper(name, tmp_path)
    expected = first.step(rows)
    shuffled = list(rows)
    random.Random(3).shuffle(shuffled)
    second = keeper(name, tmp_path)
    assert second.step(shuffled) == expected
    assert_same(first.gradients, second.gradients)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what two real gloo processes computed for every objective, an unequal share of work included."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    procs = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.learner.rank_worker", str(folder), ",".join(CORE), ",".join(REST)],
            env={**os.environ, **world, "RANK": str(rank)},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    try:
        for proc in procs:
            output, _ = proc.communicate(timeout=240)
            assert proc.returncode == 0, output.decode()
    finally:
        for proc in procs:
            proc.kill()
            proc.wait()
    return folder


@pytest.mark.parametrize(("name", "shard"), [*((name, "none") for name in ALL), *((name, "fsdp") for name in CORE)])
def test_two_ranks(name: str, shard: str, two_ranks: Path, tmp_path: Path) -> None:
    alone = keeper(name, tmp_path)
    expected = losses(alone.step(rollout_for(name)))
    for rank in range(2):
        got = load_file(two_ranks / f"{name}-{shard}-{rank}.safetensors")
        values = {k.removeprefix("value/"): float(v) for k, v in got.items() if k.startswith("value/")}
        assert values == pytest.approx(expected, abs=1e-6)
        assert_same(alone.gradients, {k: v for k, v in got.items() if not k.startswith("value/")})


def test_two_ranks_train_save_and_resume(two_ranks: Path, tmp_path: Path) -> None:
    """Replicated or sharded, undisturbed or resumed, with a moving reference and imitation beside: one policy and one
    reference come out, and they are those of a single process."""
    alone = busy_ppo(tmp_path)
    start = {k: v.clone() for k, v in module_tensors(alone.roles["reference"].module).items()}
    for seed in (1, 2):
        alone.step(rollout_for("ppo_rlhf", seed))
    expected, reference = alone.full_weights(), module_tensors(alone.roles["reference"].module)
    assert any(float((start[k] - v).abs().max()) > 1e-4 for k, v in reference.items())
    for shard in ("none", "fsdp"):
        whole = load_file(two_ranks / f"{shard}-whole" / "model.safetensors")
        assert_same(whole, load_file(two_ranks / f"{shard}-resumed" / "model.safetensors"))
        assert_same({k: expected[k] for k in whole}, whole)
        for name in ("whole", "resumed"):
            assert_same(reference, load_file(two_ranks / f"{shard}-{name}-reference.safetensors"))
        critic, moments = read_value_model(two_ranks / f"critic-{shard}", alone.policy.model)
        assert_same(module_tensors(alone.roles["critic"].module), module_tensors(critic))
        assert moments["value_weight"] > 0
    other = busy_ppo(tmp_path)
    other.load(two_ranks / "checkpoint-fsdp")
    other.step(rollout_for("ppo_rlhf", 2))
    assert_same(expected, other.full_weights())


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain, frugal = keeper("ppo_rlhf", tmp_path), keeper("ppo_rlhf", tmp_path, activation_checkpointing=True)
    expected = losses(plain.step(rollout_for("ppo_rlhf")))
    assert losses(frugal.step(rollout_for("ppo_rlhf"))) == pytest.approx(expected, abs=1e-9)
    assert_same(plain.gradients, frugal.gradients)
