"""Presets that look after entropy: forking tokens, Clip-Cov, KL-Cov, and SPO's probability mask."""

from __future__ import annotations

from typing import Any

from retool.objectives.preset import Preset, over
from retool.objectives.tables.policy_gradient import DAPO, GROUP, GRPO

_FORKING = "Beyond the 80/20 Rule, arXiv 2506.01939"
_COV = "The Entropy Mechanism, arXiv 2505.22617"

COVARIANCE: dict[str, Any] = over(
    GROUP,
    objective={"filter": {"kind": "drop"}},
    rollout={"group_size": 8, "prompts": 256, "max_tokens": 8192, "dynamic": {"kind": "accuracy"}},
    learner={"lr": 5e-7, "updates": 8},
)
"""The setting of 2505.22617 for its 7B model: 256 prompts × 8, mini-batches of 32 prompts, no KL to a reference."""


def _select(**keys: Any) -> dict[str, Any]:
    return {"select": ({"denominator": "kept", **keys},)}


ROWS: tuple[Preset, ...] = (
    Preset(
        "forking_tokens",
        "entropy",
        f"{_FORKING}: the 20 % of tokens with the highest entropy, everything else as in DAPO",
        "dapo whose gradient comes from forking tokens only",
        over(DAPO, objective=_select(kind="entropy", share=0.2)),
    ),
    Preset(
        "forking_tokens_random",
        "entropy",
        f"control of {_FORKING}: a random 20 %",
        "forking_tokens with tokens chosen at random",
        over(DAPO, objective=_select(kind="random", share=0.2)),
    ),
    Preset(
        "forking_tokens_bottom",
        "entropy",
        f"ablation of {_FORKING}: the 80 % with the lowest entropy",
        "forking_tokens without its forking tokens",
        over(DAPO, objective=_select(kind="entropy", share=0.8, side="bottom")),
    ),
    Preset(
        "clip_cov",
        "entropy",
        f"{_COV}: 2e-4 of the tokens, at random among covariances in (1, 5), get no gradient; clip 1/1",
        "group-relative policy gradient without a few of the tokens that cost most entropy",
        over(
            COVARIANCE,
            objective={
                "policy": {"clip_low": 1.0, "clip_high": 1.0},
                **_select(kind="clip_cov", share=2e-4, source="current", denominator="all_act"),
            },
        ),
    ),
    Preset(
        "kl_cov",
        "entropy",
        f"{_COV}: |log-ratio| on the 2e-3 of the tokens with the highest covariance, weight 1, no clip (7B)",
        "unclipped group-relative policy gradient with a leash on the tokens that cost most entropy",
        over(
            COVARIANCE,
            objective={"policy": {"clip_low": None, "clip_high": None}, "kl_cov": {"coef": 1.0, "share": 2e-3}},
        ),
    ),
    Preset(
        "grpo_spo_mask",
        "entropy",
        "the probability mask of SPO, arXiv 2505.23564 (old probability below 0.9), on grpo",
        "grpo on the tokens where the policy was deciding",
        over(GRPO, objective=_select(kind="low_probability", below=0.9)),
    ),
)
