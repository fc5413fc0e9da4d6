"""What each card predicts, as data, and the verdict that the seeds give: shown, not shown, or contrary."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.demo_seeds import paired


@dataclass(frozen=True)
class Claim:
    """`preset` has a larger (`sign` +1) or smaller (-1) `metric` than `baseline`, seed by seed."""

    preset: str
    baseline: str
    metric: str
    sign: int
    text: str


CLAIMS: tuple[Claim, ...] = (
    Claim("clip_cov", "grpo (dynamic)", "entropy_last", 1, "Clip-Cov keeps more entropy than GRPO"),
    Claim("kl_cov", "grpo (dynamic)", "entropy_last", 1, "KL-Cov keeps more entropy than GRPO"),
    Claim("clip_higher", "grpo", "entropy_last", 1, "clip-higher keeps more entropy than 0.2/0.2"),
    Claim("dapo", "grpo (dynamic)", "entropy_last", 1, "so does DAPO's clip among mixed groups"),
    Claim("forking_tokens_bottom", "forking_tokens", "train_gain", -1, "the bottom 80 % teach less than the top 20 %"),
    Claim("reinforce_rej", "reinforce", "kl_to_start", -1, "Reinforce-Rej moves less far than REINFORCE"),
    Claim("raft", "reinforce", "entropy_last", -1, "RAFT, from right answers only, loses entropy faster"),
    Claim(
        "vc_ppo", "vc_ppo (cold critic)", "explained_variance_first", 1, "a pretrained critic explains more at first"
    ),
    Claim("dapo", "grpo (no KL)", "mixed_groups", 1, "dynamic sampling trains on mixed groups only"),
    Claim("gspo", "grpo (no KL)", "clip_fraction", 1, "GSPO clips far more tokens than GRPO"),
    Claim("grpo", "grpo (no KL)", "kl_to_start", -1, "a KL term keeps GRPO closer to its start"),
    Claim("rloo", "reinforce", "train_gain", 1, "a leave-one-out baseline learns faster than none"),
    Claim("roc", "grpo (no KL)", "calls_ok", 1, "resampling right answers by tool errors makes calls cleaner"),
    Claim("dr_grpo", "grpo (no KL)", "length", -1, "sums over a constant do not favour long answers"),
    Claim(
        "cispo", "grpo (no KL)", "entropy_last", 1, "CISPO, whose rare tokens keep their gradient, keeps more entropy"
    ),
    Claim("reinforce_rm_wrong", "reinforce", "train_gain", 1, "leaving out all-wrong groups learns faster"),
    Claim("reinforce_mean_zero", "reinforce_rej", "kl_to_start", 1, "taking the mean off moves further than rejecting"),
    Claim("raft_pp", "raft", "entropy_last", -1, "RAFT++ loses entropy faster still"),
    Claim("single_stream", "grpo (no KL)", "train_gain", -1, "one answer a problem learns more slowly at first"),
    Claim("retool_verl", "retool", "entropy_last", 1, "clip-higher keeps more entropy with a critic, too"),
    Claim("retool_dapo", "retool_verl", "seconds", -1, "without a critic a step takes less time"),
    Claim("forking_tokens", "dapo", "entropy_last", 1, "forking tokens alone keep more entropy"),
    Claim("forking_tokens_random", "forking_tokens", "train_gain", -1, "a random 20 % teach less than the top 20 %"),
    Claim("grpo_spo_mask", "grpo", "entropy_last", 1, "SPO's mask on GRPO keeps more entropy"),
    Claim("gtpo", "grpo (no KL)", "calls_ok", 1, "turn rewards make calls cleaner"),
    Claim("ppo_rlhf", "retool", "kl_to_start", -1, "the KL in the reward keeps PPO closer to its start"),
)


def claimed() -> set[str]:
    """Names that need all seeds."""
    return {name for claim in CLAIMS for name in (claim.preset, claim.baseline)}


def judge(claim: Claim, runs: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """`runs`: name -> seed -> figures. The paired difference over the seeds that both have, with its 95 % t interval.

    shown: three seeds or more and the interval lies on the predicted side of 0; contrary: on the other one."""
    ours, theirs = (
        {seed: run[claim.metric] for seed, run in runs.get(name, {}).items() if run.get(claim.metric) is not None}
        for name in (claim.preset, claim.baseline)
    )
    seeds = sorted(set(ours) & set(theirs))
    row: dict[str, Any] = {"claim": claim.text, "preset": claim.preset, "baseline": claim.baseline}
    row |= {"metric": claim.metric, "predicted": "more" if claim.sign > 0 else "less", "seeds": len(seeds)}
    if not seeds:
        return {**row, "verdict": "not measured"}
    difference = paired([float(ours[s]) - float(theirs[s]) for s in seeds])
    low, high = difference["ci95"]
    row |= {
        "ours": statistics.fmean(ours[s] for s in seeds),
        "theirs": statistics.fmean(theirs[s] for s in seeds),
        "difference": difference["mean"],
        "ci95": [low, high] if len(seeds) > 1 else None,
    }
    if len(seeds) < 3:
        return {**row, "verdict": "not shown (fewer than 3 seeds)"}
    sides = {1: low > 0, -1: high < 0}
    return {**row, "verdict": "shown" if sides[claim.sign] else "contrary" if sides[-claim.sign] else "not shown"}
