"""Presets that imitate: supervised fine-tuning."""

from __future__ import annotations

from retool.objectives.preset import Preset

ROWS: tuple[Preset, ...] = (
    Preset(
        name="sft",
        family="imitation",
        source="token-mean negative log-likelihood over the global batch",
        summary="imitate demonstrations; tool output is context, never a target",
        fragment={
            "objective": {
                "train_on": "demo",
                "advantage": {"kind": "none"},
                "policy": {"kind": "none"},
                "nll": {"coef": 1.0},
                "aggregation": {"mode": "token_mean"},
            },
        },
    ),
)
