"""Presets without a critic: REINFORCE, its relatives, and the group-relative family."""

from __future__ import annotations

from typing import Any

from retool.objectives.preset import Preset, over

SIGNED = {"correct": 1.0, "wrong": -1.0}
BINARY = {"correct": 1.0, "wrong": 0.0}

MINIMAL: dict[str, Any] = {
    "objective": {
        "structure": "group",
        "advantage": {"kind": "raw"},
        "policy": {"kind": "clip", "clip_low": 0.2, "clip_high": 0.2},
        "aggregation": {"mode": "token_mean"},
    },
    "reward": SIGNED,
    "rollout": {"group_size": 4, "prompts": 1024, "max_tokens": 4096},
    "learner": {"lr": 1e-6, "updates": 8},
}
"""The setting of 2504.11343: rewards ±1, n 4, 1024 prompts in mini-batches of 512 responses."""

GROUP: dict[str, Any] = {
    "objective": {
        "structure": "group",
        "advantage": {"kind": "zscore", "std": "sample", "eps": 1e-6},
        "policy": {"kind": "clip", "clip_low": 0.2, "clip_high": 0.2},
        "aggregation": {"mode": "token_mean"},
    },
    "reward": BINARY,
    "rollout": {"group_size": 16},
    "learner": {"lr": 1e-6, "updates": 4},
}
"""Group-relative policy gradient without a leash; what most later papers start from."""

GRPO: dict[str, Any] = over(
    GROUP,
    objective={
        "aggregation": {"mode": "seq_mean_token_mean"},
        "kl": {"place": "loss", "estimator": "k3", "beta": 0.04},
        "reference": {"kind": "frozen"},
    },
    rollout={"group_size": 64},
    learner={"updates": 1},
)

DAPO: dict[str, Any] = over(
    GROUP,
    objective={"policy": {"clip_high": 0.28}, "filter": {"kind": "drop", "overlong": "mask_loss"}},
    # With rewards 0/1 instead of ±1 a right answer at full length would score as much as a wrong one.
    reward={**SIGNED, "overlong": {"factor": 1.0}, "right_wins": False},
    rollout={
        "group_size": 16,
        "prompts": 512,
        "max_tokens": 20480,
        "dynamic": {"kind": "accuracy"},
    },
    learner={"updates": 16, "weight_decay": 0.1},
)

_MINIMALIST = "A Minimalist Approach to LLM Reasoning, arXiv 2504.11343"
_REINFORCE = (
    Preset(
        "reinforce",
        "reinforce",
        f"{_MINIMALIST}: rewards ±1, n 4, lr 1e-6, clip 0.2, token mean",
        "the score itself is the advantage, with PPO's ratio and clip",
        over(MINIMAL, objective={"structure": "flat"}),
    ),
    Preset(
        "reinforce_rej",
        "reinforce",
        f"{_MINIMALIST}: groups that are all right or all wrong are rejected",
        "reinforce on mixed groups only",
        over(MINIMAL, objective={"filter": {"kind": "drop"}}),
    ),
    Preset(
        "reinforce_rm_wrong",
        "reinforce",
        f"{_MINIMALIST}, ablation: groups without a right answer are removed",
        "reinforce without the groups that are all wrong",
        over(MINIMAL, objective={"filter": {"kind": "drop", "groups": "all_wrong"}}),
    ),
    Preset(
        "reinforce_rm_correct",
        "reinforce",
        f"{_MINIMALIST}, ablation: groups without a wrong answer are removed",
        "reinforce without the groups that are all right",
        over(MINIMAL, objective={"filter": {"kind": "drop", "groups": "all_right"}}),
    ),
    Preset(
        "reinforce_std",
        "reinforce",
        f"{_MINIMALIST}, ablation: mixed groups, reward over the group's unbiased deviation, no mean",
        "reinforce_rej with rewards divided by the group's deviation",
        over(MINIMAL, objective={"filter": {"kind": "drop"}, "advantage": {"kind": "std", "std": "sample"}}),
    ),
    Preset(
        "reinforce_mean_zero",
        "reinforce",
        f"{_MINIMALIST}, ablation: the group's mean is taken off, nothing is removed",
        "reinforce with the group's mean as the baseline",
        over(MINIMAL, objective={"advantage": {"kind": "mean"}}),
    ),
    Preset(
        "raft",
        "reinforce",
        f"RAFT as in {_MINIMALIST}: right answers only, -log π",
        "imitate the right answers, one pass over fresh samples",
        over(
            MINIMAL,
            objective={"filter": {"positives": True}, "advantage": {"kind": "ones"}, "policy": {"kind": "plain"}},
        ),
    ),
    Preset(
        "raft_pp",
        "reinforce",
        f"RAFT++ of {_MINIMALIST}: right answers only, with ratio and clip 0.2",
        "raft with PPO's ratio and clip",
        over(MINIMAL, objective={"filter": {"positives": True}, "advantage": {"kind": "ones"}}),
    ),
    Preset(
        "reinforce_pp",
        "reinforce",
        "REINFORCE++, arXiv 2501.03262: token returns with a k1 penalty of 0.01, whitened over the batch",
        "discounted token returns, whitened over the whole rollout; no groups",
        {
            "objective": {
                "advantage": {"kind": "returns", "gamma": 1.0, "whiten": True},
                "policy": {"kind": "clip", "clip_low": 0.2, "clip_high": 0.2},
                "aggregation": {"mode": "token_mean"},
                "kl": {"place": "reward", "estimator": "k1", "beta": 0.01},
                "reference": {"kind": "frozen"},
            },
            "reward": BINARY,
            "rollout": {"group_size": 1},
            "learner": {"lr": 5e-7, "updates": 4},
        },
    ),
    Preset(
        "reinforce_pp_baseline",
        "reinforce",
        "REINFORCE++-baseline, arXiv 2501.03262: the group's mean off the score, then whitened over the batch",
        "reinforce_pp with the group's mean as the baseline, for rewards that a rule gives",
        over(
            GROUP,
            objective={"advantage": {"kind": "returns", "baseline": "group", "gamma": 1.0, "whiten": True}},
            rollout={"group_size": 8},
            learner={"lr": 5e-7},
        ),
    ),
    Preset(
        "rloo",
        "reinforce",
        "Back to Basics, arXiv 2402.14740: leave-one-out baseline, whole-sequence REINFORCE, k 4",
        "each answer against the mean of the others; no ratio, no clip",
        over(
            GROUP,
            objective={
                "advantage": {"kind": "rloo"},
                "policy": {"kind": "plain"},
                "aggregation": {"mode": "seq_mean_token_sum"},
            },
            rollout={"group_size": 4},
            learner={"updates": 1},
        ),
    ),
    Preset(
        "single_stream",
        "reinforce",
        "Single-stream Policy Optimization, arXiv 2509.13232: tracked value a problem, advantages normalised over the "
        "batch, clip-higher",
        "one answer a problem, compared with what the problem gave before",
        over(
            GROUP,
            objective={"structure": "flat", "advantage": {"kind": "tracker"}, "policy": {"clip_high": 0.28}},
            rollout={"group_size": 1, "priority": "tracker"},
        ),
    ),
)

_GROUP = (
    Preset(
        "grpo",
        "group",
        "DeepSeekMath, arXiv 2402.03300: G 64, clip 0.2, k3 in the loss with beta 0.04, lr 1e-6",
        "clipped policy gradient with the group's mean and standard deviation as the baseline",
        GRPO,
    ),
    Preset(
        "clip_higher",
        "group",
        "grpo with the clip of DAPO, arXiv 2503.14476: 0.2 below, 0.28 above",
        "grpo that lets unlikely tokens grow further",
        over(GRPO, objective={"policy": {"clip_high": 0.28}}, learner={"updates": 4}),
    ),
    Preset(
        "dr_grpo",
        "group",
        "Dr. GRPO, arXiv 2503.20783: no deviation, no length normalisation, no KL",
        "grpo without its two biases: sums over a constant, no division by the deviation",
        over(
            GROUP,
            objective={"advantage": {"kind": "mean"}, "aggregation": {"mode": "const"}},
            rollout={"group_size": 8},
        ),
    ),
    Preset(
        "gspo",
        "group",
        "GSPO, arXiv 2507.18071: sequence ratio, clip 3e-4/4e-4, four mini-batches, no KL",
        "ratio and clip of whole sequences (geometric mean of the token ratios)",
        over(
            GROUP,
            objective={
                "policy": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
                "aggregation": {"mode": "seq_mean_token_mean"},
            },
        ),
    ),
    Preset(
        "cispo",
        "group",
        "MiniMax-M1, arXiv 2506.13585: clipped importance weights, no bound below, 0.2 above",
        "the clipped ratio weighs log π, so that no token loses its gradient",
        over(
            GROUP, objective={"policy": {"kind": "cispo", "clip_low": None, "clip_high": 0.2}}, learner={"updates": 16}
        ),
    ),
    Preset(
        "sapo",
        "group",
        "SAPO, arXiv 2511.20347: tau 1.0 and 1.05, sequence mean of token means",
        "a sigmoid gate around ratio 1 in the place of the clip",
        over(GROUP, objective={"policy": {"kind": "sapo"}, "aggregation": {"mode": "seq_mean_token_mean"}}),
    ),
    Preset(
        "dapo",
        "group",
        "DAPO, arXiv 2503.14476: clip 0.2/0.28, mixed groups only, token mean, overlong filter, ±1, G 16, 512 prompts",
        "grpo for long chains of thought: clip-higher, dynamic sampling, token-level loss, overlong handling",
        DAPO,
    ),
)

ROWS: tuple[Preset, ...] = (*_GROUP, *_REINFORCE)
