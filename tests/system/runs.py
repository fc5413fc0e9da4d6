"""Real `retool` processes on tiny recipes, and what their run folders hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file

from retool.records import RewardResult, Trajectory
from retool.rollout.log import RolloutLog
from tests.system import warm
from tests.system.warm import REPO


def environment() -> dict[str, str]:
    """The environment of a user who stands in the repository."""
    return {**os.environ, "PYTHONPATH": str(REPO), "COLUMNS": "200", "NO_COLOR": "1"}


def retool(*args: str, cwd: Path = REPO, timeout: float = 240, fresh: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the command to its end. `fresh`: in a new interpreter, as `python -m retool` is for a user."""
    if not fresh:
        return warm.run(args, cwd, environment(), timeout)
    command = [sys.executable, "-m", "retool", *args]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout)


def start(*args: str) -> subprocess.Popen[bytes]:
    """Start the command and let it run."""
    return subprocess.Popen(
        [sys.executable, "-m", "retool", *args],
        cwd=REPO,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def ledger(run: Path) -> list[dict]:
    """The lines of learner.jsonl that are whole."""
    path = run / "learner.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def trained_ids(run: Path) -> list[tuple[int, tuple[str, ...]]]:
    """(step, ordered sample ids) of each update."""
    return [(row["step"], tuple(row["samples"])) for row in ledger(run) if "samples" in row]


def logged_ids(run: Path) -> dict[int, list[str]]:
    """step -> trajectory ids in the rollout log."""
    with RolloutLog(run / "rollouts", read_only=True) as log:
        return {s: [t.id for g in log.read_step(s) for t in g.trajectories] for s in log.steps()}


def by_digits(trajectory: Trajectory, result: RewardResult) -> RewardResult:
    """A reward (`reward.custom`) that an untrained model earns in part: the share of digits in what it wrote."""
    text = trajectory.policy_text
    return replace(result, score=sum(c.isdigit() for c in text) / max(len(text), 1))


def weights(run: Path) -> dict:
    return load_file(run / "model" / "model.safetensors")


def by_parity(trajectory: Trajectory, result: RewardResult) -> RewardResult:
    """A reward that makes some groups mixed and others not: for two problems in five it is a coin, for the others 0."""
    teaches = sum(map(ord, trajectory.problem.prompt)) % 5 < 2
    coin = float(len(trajectory.policy_text) % 2) if teaches else 0.0
    return replace(result, accuracy=coin, score=coin)
