"""`kill -9` and `--resume` with dynamic sampling: cursor and carried groups come back, to the last bit."""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch

from tests.system.runs import ledger, logged_ids, retool, trained_ids, weights
from tests.system.test_resume import STEPS, kill_then_resume, train_args

DYNAMIC = (
    "reward.custom=tests.system.runs:by_parity",
    "rollout.prompts=2",
    "rollout.dynamic.kind=accuracy",
    "rollout.dynamic.batch=3",
    "rollout.dynamic.max_batches=3",
    "rollout.dynamic.max_staleness=2",
)


def test_three_kills_change_no_bit_of_a_run_that_carries_groups_over(tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "killed"
    done = retool(*train_args(whole, *DYNAMIC))
    assert done.returncode == 0, done.stderr
    metrics = [row["metrics"] for row in ledger(whole) if "metrics" in row]
    assert any(m["dynamic/from_before"] > 0 for m in metrics) and any(m["dynamic/batches"] > 1 for m in metrics)
    assert any(m["dynamic/mixed"] < 1 for m in metrics)
    kill_then_resume(out, random.Random(time.time_ns()), *DYNAMIC)
    assert trained_ids(out) == trained_ids(whole) and len(trained_ids(out)) == STEPS
    assert logged_ids(out) == logged_ids(whole)
    assert [r["memory"] for r in ledger(out) if "samples" in r] == [
        r["memory"] for r in ledger(whole) if "samples" in r
    ]
    trained = [i for _, ids in trained_ids(out) for i in ids]
    assert len(trained) == len(set(trained))  # no trajectory twice, carried or not
    ours, theirs = weights(out), weights(whole)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_a_step_without_a_mixed_group_counts_and_changes_nothing(tmp_path: Path) -> None:
    """An untrained model is never right: every step starves."""
    out = tmp_path / "run"
    starved = ("rollout.dynamic.kind=accuracy", "rollout.dynamic.max_batches=2", "steps=2", "reward.custom=null")
    done = retool(*train_args(out, *starved))
    assert done.returncode == 0, done.stderr
    metrics = [row["metrics"] for row in ledger(out) if "metrics" in row]
    assert [m["updates"] for m in metrics] == [0, 0] and [m["dynamic/starved"] for m in metrics] == [4, 4]
    assert all(m["rollout/accuracy"] == 0 and m["dynamic/batches"] == 2 for m in metrics)
    assert {s: len(ids) for s, ids in logged_ids(out).items()} == {0: 32, 1: 32}
    page = retool("view", str(out))
    assert page.returncode == 0 and (out / "report.html").exists()
