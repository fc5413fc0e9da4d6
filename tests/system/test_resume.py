"""`kill -9` of a training run at random moments, then `--resume`: nothing skipped, nothing twice, equal bits."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.system.runs import ledger, logged_ids, retool, start, trained_ids, weights

STEPS = 8


def train_args(out: Path, *more: str) -> list[str]:
    return ["train", "recipes/tiny.yaml", f"out={out}", "reward.custom=tests.system.runs:by_digits", *more]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run nobody touched."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    done = retool(*train_args(out))
    assert done.returncode == 0, done.stderr
    metrics = [row["metrics"] for row in ledger(out) if "metrics" in row]
    assert all(m["grad_norm/policy"] > 0 and m["advantage/std"] > 0 for m in metrics)  # every step changes the weights
    return out


def kill_then_resume(out: Path, rng: random.Random, *more: str) -> None:
    """Kill three times, at a random moment before, between and after the run's checkpoints, then let it finish.

    The ledger has two lines a step and a checkpoint comes after every third step, so that each window of lines holds
    moments of sampling, learning and saving.
    """
    for window in ((0, 5), (6, 11), (12, 15)):
        begun = (out / "recipe.yaml").exists()
        process = start(*train_args(out, *more, *(["--resume"] if begun else [])))
        lines = rng.randint(*window)
        wait_for(lambda lines=lines: (out / "recipe.yaml").exists() and count_lines(out) >= lines, process)
        time.sleep(rng.uniform(0, 0.1))
        assert process.poll() is None, "the run ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = retool(*train_args(out, *more, "--resume"))
    assert done.returncode == 0, done.stderr


def count_lines(out: Path) -> int:
    ledger_file = out / "learner.jsonl"
    return ledger_file.read_bytes().count(b"\n") if ledger_file.exists() else 0


def test_three_kills_change_no_bit(undisturbed: Path, tmp_path: Path) -> None:
    whole = undisturbed
    out = tmp_path / "killed"
    kill_then_resume(out, random.Random(time.time_ns()))
    assert trained_ids(out) == trained_ids(whole)
    assert [s for s, _ in trained_ids(out)] == list(range(STEPS))
    assert logged_ids(out) == logged_ids(whole)
    ours, theirs = weights(out), weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_kills_without_determinism_lose_no_group(undisturbed: Path, tmp_path: Path) -> None:
    whole = undisturbed
    out = tmp_path / "killed"
    kill_then_resume(out, random.Random(time.time_ns()), "deterministic=false")
    assert [s for s, _ in trained_ids(out)] == list(range(STEPS))
    logged = logged_ids(out)
    assert {s: sorted(ids) for s, ids in logged.items()} == {s: sorted(i) for s, i in logged_ids(whole).items()}
    for step, ids in trained_ids(out):
        assert len(set(ids)) == len(ids)
        assert set(ids) <= set(logged[step])
    metrics = [row for row in ledger(out) if "metrics" in row]
    assert [row["step"] for row in metrics] == list(range(STEPS))


def test_a_killed_cold_start_ends_in_the_same_bits(tmp_path: Path) -> None:
    """Traces and SFT, each killed once and started again."""
    whole, out = tmp_path / "whole", tmp_path / "killed"
    small = ["data.problems.count=400", "sft.steps=30", "sft.batch_size=16", "sft.checkpoint_every=4"]

    def args(command: str, folder: Path, *more: str) -> list[str]:
        return [*command.split(), "recipes/tiny.yaml", f"out={folder}", *small, *more]

    for command in ("data generate", "sft"):
        done = retool(*args(command, whole))
        assert done.returncode == 0, done.stderr
    first = start(*args("data generate", out))
    wait_for(lambda: any(out.glob("traces.jsonl.partial*")), first)
    first.kill()
    first.wait()
    assert retool(*args("data generate", out)).returncode == 0
    assert (out / "traces.jsonl").read_bytes() == (whole / "traces.jsonl").read_bytes()
    second = start(*args("sft", out))
    wait_for(lambda: any((out / "sft" / "checkpoints").glob("0*")), second)
    second.kill()
    second.wait()
    done = retool(*args("sft", out, "--resume"))
    assert done.returncode == 0, done.stderr
    ours, theirs = weights(out / "sft"), weights(whole / "sft")
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Until the condition holds or the process has ended."""
    while process.poll() is None and not condition():
        time.sleep(0.01)


def test_resume_refuses_another_recipe_and_a_missing_run(undisturbed: Path, tmp_path: Path) -> None:
    whole = undisturbed
    other = retool(*train_args(whole, "--resume", "learner.lr=0.5"))
    assert other.returncode == 2 and "learner" in other.stderr
    again = retool(*train_args(whole))
    assert again.returncode == 2 and "--resume" in again.stderr
    missing = retool(*train_args(tmp_path / "nothing", "--resume"))
    assert missing.returncode == 2 and "no run to resume" in missing.stderr
    assert not (tmp_path / "nothing").exists()
