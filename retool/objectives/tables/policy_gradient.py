"""Presets without a critic: REINFORCE, its relatives, and the group-relative family."""

from __future__ import annotations

from retool.objectives.preset import Preset

ROWS: tuple[Preset, ...] = (
    Preset(
        name="grpo",
        family="group",
        source="DeepSeekMath, arXiv 2402.03300: G 64, clip 0.2, k3 in the loss with beta 0.04, lr 1e-6",
        summary="clipped policy gradient with the group's mean and standard deviation as the baseline",
        fragment={
            "objective": {
                "structure": "group",
                "advantage": {"kind": "zscore", "std": "sample", "eps": 1e-6},
                "policy": {"kind": "clip", "clip_low": 0.2, "clip_high": 0.2},
                "aggregation": {"mode": "seq_mean_token_mean"},
                "kl": {"place": "loss", "estimator": "k3", "beta": 0.04},
                "reference": {"kind": "frozen"},
            },
            "rollout": {"group_size": 64},
            "learner": {"lr": 1e-6, "updates": 1},
        },
    ),
)
