"""Presets with a critic: PPO and what was built on it."""

from __future__ import annotations

from retool.objectives.preset import Preset

ROWS: tuple[Preset, ...] = (
    Preset(
        name="ppo_rlhf",
        family="actor-critic",
        source="PPO, arXiv 1707.06347, as in RLHF practice: lambda = gamma = 1, k1 in the reward with beta 0.01, "
        "value clip 0.2 (arXiv 2404.10719)",
        summary="clipped policy gradient with a critic; GAE skips tool output",
        fragment={
            "objective": {
                "advantage": {"kind": "gae", "gamma": 1.0, "lam": 1.0, "lam_value": 1.0, "whiten": True},
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
)
