"""Presets with a critic: PPO and what was built on it; `retool_dapo` is their family without one."""

from __future__ import annotations

from typing import Any

from retool.objectives.preset import Preset

_VERIFIED = {"correct": 1.0, "wrong": -1.0}
_GAE: dict[str, Any] = {"kind": "gae", "gamma": 1.0, "lam": 1.0, "lam_value": 1.0, "whiten": True}
_VERL_CLIP: dict[str, Any] = {"kind": "clip", "clip_low": 0.2, "clip_high": 0.28, "dual_clip": 10.0}

ROWS: tuple[Preset, ...] = (
    Preset(
        name="ppo_rlhf",
        family="actor-critic",
        source="PPO, arXiv 1707.06347, as in RLHF practice: lambda = gamma = 1, k1 in the reward with beta 0.01, "
        "value clip 0.2 (arXiv 2404.10719)",
        summary="clipped policy gradient with a critic; GAE skips tool output",
        fragment={
            "objective": {
                "advantage": _GAE,
                "policy": {"kind": "clip", "clip_low": 0.2, "clip_high": 0.2},
                "aggregation": {"mode": "token_mean"},
                "kl": {"place": "reward", "estimator": "k1", "beta": 0.01},
                "reference": {"kind": "frozen"},
                "critic": {"kind": "policy", "value_clip": 0.2},
            },
            "rollout": {"group_size": 1},
            "learner": {"lr": 1e-6, "updates": 4},
        },
    ),
    Preset(
        name="retool",
        family="actor-critic",
        source="ReTool, arXiv 2504.11536: reward +-1 for the answer alone, KL 0, lr 1e-6; what the paper leaves open "
        "(clip, GAE, whitening) is plain PPO",
        summary="PPO on outcome reward with a live interpreter, no KL",
        fragment={
            "objective": {
                "advantage": _GAE,
                "policy": {"kind": "clip", "clip_low": 0.2, "clip_high": 0.2},
                "aggregation": {"mode": "token_mean"},
                "critic": {"kind": "policy", "value_clip": 0.5},
            },
            "reward": _VERIFIED,
            "rollout": {"group_size": 1, "max_turns": 8},
            "learner": {"lr": 1e-6, "updates": 4},
        },
    ),
    Preset(
        name="retool_verl",
        family="actor-critic",
        source="the public verl recipe of ReTool (PPO): clip 0.2/0.28, dual clip 10, critic lr 2e-6, 20 critic-only "
        "steps, 1024 prompts x 1, mini-batch 256",
        summary="retool with clip-higher, dual clip and a critic warm-up",
        fragment={
            "objective": {
                "advantage": _GAE,
                "policy": _VERL_CLIP,
                "aggregation": {"mode": "token_mean"},
                "critic": {"kind": "policy", "value_clip": 0.5, "warmup": 20},
            },
            "reward": _VERIFIED,
            "rollout": {"group_size": 1, "max_turns": 8},
            "learner": {"lr": 1e-6, "updates": 4},
        },
    ),
    Preset(
        name="retool_dapo",
        family="group",
        source="the public verl recipe of ReTool (group baseline): clip 0.2/0.28, dual clip 10, 512 prompts x 16, "
        "mini-batch 64 prompts, lr 1e-6",
        summary="retool without a critic: the group's z-score is the advantage",
        fragment={
            "objective": {
                "structure": "group",
                "advantage": {"kind": "zscore", "std": "sample", "eps": 1e-6},
                "policy": _VERL_CLIP,
                "aggregation": {"mode": "token_mean"},
            },
            "reward": _VERIFIED,
            "rollout": {"group_size": 16, "max_turns": 8},
            "learner": {"lr": 1e-6, "updates": 8},
        },
    ),
    Preset(
        name="vc_ppo",
        family="actor-critic",
        source="VC-PPO, arXiv 2503.01491: value pretraining, lambda 0.95 for the policy and 1 for the critic; base "
        "values of VAPO's PPO baseline (sample-level loss, clip 0.2, lr 1e-6, critic 2e-6)",
        summary="PPO with a pretrained critic and decoupled GAE",
        fragment={
            "objective": {
                "advantage": {**_GAE, "lam": 0.95},
                "policy": {"kind": "clip", "clip_low": 0.2, "clip_high": 0.2},
                "aggregation": {"mode": "seq_mean_token_mean"},
                "critic": {
                    "kind": "policy",
                    "value_clip": 0.5,
                    "pretrain": {"steps": 100, "min_explained_variance": 0.5, "patience": 3, "every": 5},
                },
            },
            "reward": _VERIFIED,
            "rollout": {"group_size": 1},
            "learner": {"lr": 1e-6, "updates": 16},
        },
    ),
    Preset(
        name="vapo",
        family="actor-critic",
        source="VAPO, arXiv 2504.05118: 50 steps of value pretraining, lambda = 1 - 1/(0.05 l), clip 0.2/0.28, NLL 0.1 "
        "on right answers, 512 prompts x 16, mini-batch 512, lr 1e-6, critic 2e-6",
        summary="VC-PPO with length-adaptive lambda, clip-higher and imitation of right answers",
        fragment={
            "objective": {
                "advantage": {**_GAE, "lam": {"alpha": 0.05, "min": 0.0, "max": 1 - 1e-4}},
                "policy": {"kind": "clip", "clip_low": 0.2, "clip_high": 0.28},
                "aggregation": {"mode": "token_mean"},
                "nll": {"coef": 0.1, "positives": True},
                "critic": {
                    "kind": "policy",
                    "value_clip": 0.5,
                    "pretrain": {"steps": 50, "min_explained_variance": 1.0, "every": 5},
                },
            },
            "reward": _VERIFIED,
            "rollout": {"group_size": 16},
            "learner": {"lr": 1e-6, "updates": 16},
        },
    ),
)
