"""Presets for tool use and stale rollouts: void turns, resampling, turn returns, off-policy corrections."""

from __future__ import annotations

from retool.objectives.preset import Preset, over
from retool.objectives.tables.policy_gradient import GROUP

_HIGHER = over(GROUP, objective={"policy": {"clip_high": 0.28}})

_FILTERS = (
    Preset(
        "simpletir",
        "agent",
        "SimpleTIR, arXiv 2509.02479: trajectories with a void turn leave the loss and stay in the group's statistics",
        "group-relative policy gradient without trajectories that have a void turn",
        over(_HIGHER, objective={"filter": {"void": "mask_loss"}}),
    ),
    Preset(
        "roc",
        "agent",
        "rStar2-Agent, arXiv 2508.20722: sample 2G, drop uniform groups, keep G: clean right answers, random wrong "
        "ones; clip 0.2/0.28, no KL",
        "resample on correct: right answers with failed calls or repeated answers are the first to go",
        over(_HIGHER, objective={"filter": {"kind": "drop", "roc": 0.5}}, rollout={"group_size": 16, "oversample": 2}),
    ),
    Preset(
        "gtpo",
        "agent",
        "GTPO, arXiv 2511.14846: discounted returns of turns, normalised in the group, gamma 0.9",
        "one advantage a turn, from turn rewards",
        over(
            GROUP,
            objective={"advantage": {"kind": "turns", "gamma": 0.9}},
            reward={"turns": {"failed_call": 0.1, "malformed": 0.1}},
        ),
    ),
)

_CORRECTIONS = (
    Preset(
        "tis",
        "off-policy",
        "truncated importance sampling between engine and learner: min(ρ, 2) a token",
        "group-relative policy gradient, weighted by how much likelier the learner finds each token, at most 2",
        over(GROUP, objective={"off_policy": {"old": "recomputed", "weight": "token", "cap": 2.0}}),
    ),
    Preset(
        "mis",
        "off-policy",
        "IcePop, arXiv 2510.18855: ρ where it is in [0.5, 5], else 0",
        "tis that drops tokens on which engine and learner disagree",
        over(
            GROUP,
            objective={
                "off_policy": {
                    "old": "recomputed",
                    "weight": "token",
                    "cap": None,
                    "reject": "token",
                    "low": 0.5,
                    "high": 5.0,
                    "denominator": "all_act",
                }
            },
        ),
    ),
    Preset(
        "geo_rs",
        "off-policy",
        "rejection by the geometric mean of ρ over the sequence, accepted in [0.999, 1.001] as verl suggests",
        "drops whole sequences on which engine and learner disagree",
        over(
            GROUP,
            objective={
                "off_policy": {
                    "old": "recomputed",
                    "reject": "geo",
                    "low": 0.999,
                    "high": 1.001,
                    "denominator": "kept",
                }
            },
        ),
    ),
    Preset(
        "decoupled_ppo",
        "off-policy",
        "AReaL, arXiv 2505.24298: clip against the recomputed policy, behaviour weight masked above 5",
        "clipped ratio to the policy before the update, times the weight of that policy against the sampling one",
        over(
            GROUP,
            objective={
                "off_policy": {
                    "old": "recomputed",
                    "weight": "token",
                    "cap": None,
                    "reject": "token",
                    "low": 0.0,
                    "high": 5.0,
                    "denominator": "all_act",
                }
            },
        ),
    ),
    Preset(
        "off_policy_mask",
        "off-policy",
        "DeepSeek-V3.2's sequence mask: no negative sequence with a mean of log π_old - log π above 0.5",
        "drops bad answers that the policy has already moved away from",
        over(
            GROUP,
            objective={"select": ({"kind": "off_policy", "delta": 0.5, "denominator": "all_act"},)},
        ),
    ),
)

ROWS: tuple[Preset, ...] = (*_FILTERS, *_CORRECTIONS)
