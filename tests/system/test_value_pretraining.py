"""Value pretraining, imitation beside RL and reward models as a user runs them: real processes, the live sandbox."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import torch

from retool.rollout.log import RolloutLog
from tests.system.runs import ledger, logged_ids, retool, start, trained_ids, weights
from tests.system.test_resume import wait_for

PHASE = ["objective.critic.pretrain.steps=5", "objective.critic.pretrain.every=2", "steps=3", "checkpoint_every=1"]
SMALL = ["objective.preset=vapo", "rollout.prompts=2", "learner.updates=2", "learner.critic_lr=1e-3"]


def args(out: Path, *more: str) -> list[str]:
    custom = "reward.custom=tests.system.runs:by_digits"
    return ["train", "recipes/tiny.yaml", f"out={out}", custom, *SMALL, *PHASE, *more]


def test_a_killed_pretraining_changes_no_bit(tmp_path: Path) -> None:
    """`kill -9` inside the phase, then --resume: the same critic, the same policy, RL steps numbered from 0."""
    whole, out = tmp_path / "whole", tmp_path / "killed"
    done = retool(*args(whole))
    assert done.returncode == 0, done.stderr
    assert "held-out explained variance" in done.stdout
    first = start(*args(out))
    phase_ledger = out / "pretrain" / "learner.jsonl"
    wait_for(lambda: phase_ledger.exists() and phase_ledger.read_bytes().count(b"\n") >= 7, first)
    assert first.poll() is None, "the run ended before it could be killed"
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not ledger(out), "RL had not begun"
    done = retool(*args(out, "--resume"))
    assert done.returncode == 0, done.stderr
    assert trained_ids(out) == trained_ids(whole) and [s for s, _ in trained_ids(out)] == [0, 1, 2]
    assert logged_ids(out) == logged_ids(whole)
    assert trained_ids(out / "pretrain") == trained_ids(whole / "pretrain")
    assert [s for s, _ in trained_ids(out / "pretrain")] == list(range(6))
    ours, theirs = weights(out), weights(whole)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert (out / "critic" / "model.safetensors").read_bytes() == (whole / "critic" / "model.safetensors").read_bytes()
    with (
        RolloutLog(out / "rollouts", read_only=True) as log,
        RolloutLog(out / "pretrain/rollouts", read_only=True) as p,
    ):
        texts = [{t.policy_text for g in x.read_step(step) for t in g.trajectories} for x, step in ((log, 0), (p, 1))]
    assert not texts[0] & texts[1], "the phase must not sample what RL will sample"
    again = retool(
        *args(
            tmp_path / "again",
            "objective.critic.pretrain.steps=0",
            "objective.critic.kind=checkpoint",
            f"objective.critic.path={whole / 'critic'}",
            "steps=1",
        )
    )
    assert again.returncode == 0, again.stderr
    metrics = ledger(tmp_path / "again")[1]["metrics"]
    assert metrics["value/explained_variance"] == ledger(whole)[1]["metrics"]["value/explained_variance"]


def texts(run: Path, step: int) -> set[str]:
    """What the policy wrote in a step."""
    with RolloutLog(run / "rollouts", read_only=True) as log:
        return {t.policy_text for g in log.read_step(step) for t in g.trajectories}


def test_traces_labels_and_a_reward_model(tmp_path: Path) -> None:
    """Cold start, imitation beside RL, then a reward model from labelled traces and one from a run's rollouts."""
    out = tmp_path / "run"
    made = retool("data", "generate", "recipes/tiny.yaml", f"out={out}", "data.problems.count=60")
    assert made.returncode == 0, made.stderr
    rl = ["steps=2", "objective.ptx.coef=0.05", "objective.ptx.batch=4"]
    done = retool("train", "recipes/tiny.yaml", f"out={out}", *rl)
    assert done.returncode == 0, done.stderr
    assert all(row["metrics"]["loss/ptx"] > 0 for row in ledger(out) if "metrics" in row)
    rows = []
    for line in (out / "traces.jsonl").read_text().splitlines():
        right, wrong = json.loads(line), json.loads(line)
        wrong["id"] += "-wrong"
        wrong["segments"][-1]["text"] = wrong["segments"][-1]["text"].replace("<answer>", "<answer>9")
        rows += [{"trace": right, "label": 1}, {"trace": wrong, "label": 0}]
    labelled = tmp_path / "labelled.jsonl"
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = ["sft.steps=6", "sft.batch_size=8", "sft.lr=1e-3", "sft.checkpoint_every=2"]
    command = ["sft", "recipes/tiny.yaml", f"out={tmp_path / 'rm'}", f"sft.data={labelled}", *small]
    done = retool(*command, "sft.head=pairwise")
    assert done.returncode == 0, done.stderr
    assert "held-out accuracy of the reward model" in done.stdout
    about = json.loads((tmp_path / "rm" / "reward_model" / "model" / "value_model.json").read_text())
    assert about["kind"] == "reward_model"
    path = f"objective.critic.path={tmp_path / 'rm' / 'reward_model' / 'model'}"
    ppo = ["objective.preset=ppo_rlhf", "objective.critic.kind=reward_model", path, "steps=1", "learner.updates=1"]
    done = retool("train", "recipes/tiny.yaml", f"out={tmp_path / 'ppo'}", *ppo)
    assert done.returncode == 0, done.stderr
    labelled.write_text(labelled.read_text() + '{"trace": {}, "label": 1}\n')
    done = retool(*command, "sft.head=pointwise", f"out={tmp_path / 'bad'}")
    assert done.returncode == 2 and f"line {len(rows) + 1}" in done.stderr
    done = retool("sft", "recipes/tiny.yaml", f"out={out}", *small, "sft.head=pairwise")
    assert done.returncode == 2 and "right and a wrong" in done.stderr  # an untrained model is never right
