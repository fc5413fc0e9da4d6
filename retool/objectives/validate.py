"""Combinations that make no sense are refused by name when the recipe loads (A appendix B, B §11)."""

from __future__ import annotations

from collections.abc import Iterator

from retool.config import Recipe
from retool.config.objective import LambdaConfig
from retool.config.reward import reward_errors, reward_warnings
from retool.objectives.base import ObjectiveError
from retool.objectives.presets import find_preset

GROUP_KINDS = ("zscore", "mean", "rloo", "std", "turns")
DISCOUNTED = ("gae", "returns", "turns")
WHITENED = ("gae", "returns")


def const_length(recipe: Recipe) -> int | None:
    """The C of `const`: what the recipe says, or the longest response that is sampled; None for demonstrations."""
    said = recipe.objective.aggregation.const_length
    return recipe.rollout.max_tokens if said is None and recipe.objective.train_on == "sampled" else said


def validate(recipe: Recipe) -> list[str]:
    """Warnings about a recipe's objective. Raises `ObjectiveError` listing everything that cannot be run."""
    find_preset(recipe.objective.preset)
    if errors := list(_errors(recipe)):
        raise ObjectiveError("; ".join(errors))
    return list(_warnings(recipe))


def _errors(recipe: Recipe) -> Iterator[str]:
    yield from _advantage_errors(recipe)
    yield from _filter_errors(recipe)
    yield from _loss_errors(recipe)
    yield from _surrogate_errors(recipe)
    yield from _select_errors(recipe)
    yield from _leash_errors(recipe)
    yield from _off_policy_errors(recipe)
    yield from reward_errors(recipe)


def _advantage_errors(recipe: Recipe) -> Iterator[str]:
    o, g = recipe.objective, recipe.rollout.group_size
    if o.advantage.kind in GROUP_KINDS and g < 2:
        yield f"objective.advantage.kind={o.advantage.kind} compares within a group: rollout.group_size must be >= 2"
    if o.advantage.baseline == "group" and o.advantage.kind != "returns":
        yield f"objective.advantage.baseline is for kind=returns: kind={o.advantage.kind} has its own"
    if o.advantage.baseline == "group" and g < 2:
        yield "objective.advantage.baseline=group compares within a group: rollout.group_size must be >= 2"
    if o.advantage.kind == "ones" and not o.filter.positives:
        yield "objective.advantage.kind=ones praises every sample: set objective.filter.positives=true"
    if o.tracker.min_keep > o.tracker.max_keep:
        yield f"objective.tracker.min_keep={o.tracker.min_keep} must not exceed max_keep={o.tracker.max_keep}"
    if o.advantage.kind == "gae" and o.critic.kind == "none":
        yield "objective.advantage.kind=gae needs values: set objective.critic.kind=policy"
    if o.advantage.kind != "gae" and o.critic.kind != "none":
        yield f"objective.critic is never used by advantage.kind={o.advantage.kind}: set objective.critic.kind=none"
    if o.advantage.kind != "gae" and o.advantage.bootstrap_on_truncation:
        yield "objective.advantage.bootstrap_on_truncation needs a critic: advantage.kind=gae"
    if isinstance(o.advantage.lam, float) and not 0 <= o.advantage.lam <= 1:
        yield f"objective.advantage.lam={o.advantage.lam} must be in [0, 1]"
    if o.critic.kind == "none" and (o.critic.normalise or o.critic.warmup or o.critic.pretrain.steps):
        yield "objective.critic.normalise, .warmup and .pretrain need a critic: objective.critic.kind=policy"
    if o.critic.kind in ("reward_model", "checkpoint") and o.critic.path is None:
        yield f"objective.critic.kind={o.critic.kind} needs objective.critic.path: the folder to load"
    if o.critic.kind in ("none", "policy") and o.critic.path is not None:
        yield "objective.critic.path needs objective.critic.kind=reward_model or checkpoint"


def _filter_errors(recipe: Recipe) -> Iterator[str]:
    f, g = recipe.objective.filter, recipe.rollout.group_size
    if f.kind != "keep" and g < 2:
        yield f"objective.filter.kind={f.kind} looks at groups: rollout.group_size must be >= 2"
    if f.roc is not None and g < 2:
        yield "objective.filter.roc chooses within groups: rollout.group_size must be >= 2"
    if f.groups != "uniform" and f.kind == "keep":
        yield f"objective.filter.groups={f.groups} says which groups, not what happens to them: set filter.kind=drop"
    if f.overlong == "keep" and not f.overlong_in_baseline:
        yield "objective.filter.overlong_in_baseline=false needs objective.filter.overlong=mask_loss"
    if recipe.objective.structure == "pairs" and f != type(f)():
        yield "objective.filter would tear pairs apart: structure=pairs takes none"


def _surrogate_errors(recipe: Recipe) -> Iterator[str]:
    p, off = recipe.objective.policy, recipe.objective.off_policy
    if p.dual_clip is not None and p.kind not in ("clip", "none"):
        yield f"objective.policy.dual_clip belongs to the clip: policy.kind={p.kind} has none"
    if p.cap is not None and p.kind != "cispo":
        yield f"objective.policy.cap is CISPO's: policy.kind={p.kind} has no such bound"
    if p.ratio == "sequence" and p.kind not in ("clip", "none"):
        yield f"objective.policy.ratio=sequence is for policy.kind=clip, not {p.kind}"
    if p.kind == "sapo" and off.weight != "none" and off.old == "recomputed":
        yield (
            "objective.policy.kind=sapo gates the ratio to the sampling policy: off_policy.weight with old=recomputed "
            "splits that ratio in two; use off_policy.old=rollout and weight=none"
        )


def _select_errors(recipe: Recipe) -> Iterator[str]:
    o = recipe.objective
    covariance = o.kl_cov.coef > 0 or any(s.kind == "clip_cov" for s in o.select)
    if o.select and o.policy.kind == "none":
        yield "objective.select chooses tokens of the policy term: policy.kind=none has none"
    if o.kl_cov.coef and o.policy.kind == "none":
        yield "objective.kl_cov holds back a policy gradient: policy.kind=none has none"
    if covariance and o.entropy_coef < 0:
        yield "objective.entropy_coef < 0 lowers the entropy that clip_cov and kl_cov keep: choose one"
    for s in o.select:
        if s.kind == "entropy" and s.scope == "rollout" and s.source == "current":
            yield "objective.select: scope=rollout is chosen before the first update: source=current needs minibatch"
        if s.kind == "clip_cov" and s.low >= s.high:
            yield f"objective.select: clip_cov takes covariances between low={s.low} and high={s.high}: none are"


def _loss_errors(recipe: Recipe) -> Iterator[str]:
    o = recipe.objective
    if o.policy.kind != "none" and o.advantage.kind == "none":
        yield f"objective.policy.kind={o.policy.kind} needs advantages: choose objective.advantage.kind"
    if o.policy.kind == "none" and o.advantage.kind != "none":
        yield f"objective.advantage.kind={o.advantage.kind} has no reader: set it to none, or policy.kind=clip"
    own_terms = find_preset(o.preset).compose is not None
    if o.policy.kind == "none" and not (o.nll.coef or o.pair.coef or o.entropy_coef or own_terms):
        yield "the objective has no term: set policy.kind, nll.coef, pair.coef or entropy_coef"
    if "const" in (o.aggregation.mode, o.kl.aggregation) and const_length(recipe) is None:
        yield "aggregation `const` of demonstrations needs objective.aggregation.const_length (longest one in tokens)"
    if o.pair.coef and o.structure != "pairs":
        yield "objective.pair needs objective.structure=pairs"
    if o.pair.coef and o.policy.kind != "none":
        yield "objective.pair takes no advantages: set objective.policy.kind=none"
    if o.structure == "pairs" and not o.pair.coef:
        yield "objective.structure=pairs needs objective.pair.coef > 0"
    if o.ptx.coef and o.train_on == "demo":
        yield "objective.ptx adds imitation to RL: train_on=demo is imitation already"
    if o.train_on == "demo" and o.policy.kind != "none":
        yield "objective.train_on=demo has no sampling log-probs: a policy gradient needs train_on=sampled"


def _leash_errors(recipe: Recipe) -> Iterator[str]:
    o = recipe.objective
    if o.kl.place != "none" and o.reference.kind == "none":
        yield f"objective.kl.place={o.kl.place} needs objective.reference.kind=frozen"
    if o.pair.coef and o.reference.kind == "none":
        yield "objective.pair needs objective.reference.kind=frozen"
    if o.kl.controller == "adaptive" and o.kl.target is None:
        yield "objective.kl.controller=adaptive needs objective.kl.target (nats a sample)"
    if o.kl.controller == "adaptive" and not (o.kl.place != "none" and o.kl.beta > 0):
        yield "objective.kl.controller=adaptive needs kl.place and a first kl.beta > 0"
    if o.kl.place == "reward" and o.policy.kind == "none":
        yield "objective.kl.place=reward acts through advantages: policy.kind=none has none"


def _off_policy_errors(recipe: Recipe) -> Iterator[str]:
    off = recipe.objective.off_policy
    steps = recipe.learner.updates * recipe.learner.epochs
    active = off.weight != "none" or off.reject != "none"
    if active and off.old == "rollout":
        yield "objective.off_policy.old=rollout already clips against the engine: weight and reject would count twice"
    if active and recipe.objective.policy.kind == "none":
        yield "objective.off_policy corrects the policy term: policy.kind=none has none"
    if off.old == "detached" and steps > 1:
        yield (
            "objective.off_policy.old=detached is for one optimiser step a rollout, but learner.updates x epochs is "
            f"{steps}: the surrogate would never clip"
        )
    if off.reject != "none" and off.low >= off.high:
        yield f"objective.off_policy.low={off.low} must be below high={off.high}"


def _warnings(recipe: Recipe) -> Iterator[str]:
    o, rollout = recipe.objective, recipe.rollout
    yield from reward_warnings(recipe)
    if o.advantage.whiten and o.advantage.kind not in WHITENED:
        yield "objective.advantage.whiten is ignored: group advantages are normalised already"
    if o.advantage.gamma < 1 and o.advantage.kind not in DISCOUNTED:
        yield f"objective.advantage.gamma is ignored: advantage.kind={o.advantage.kind} knows no time"
    if isinstance(o.advantage.lam, LambdaConfig) and rollout.max_tokens < 2 / o.advantage.lam.alpha:
        yield "objective.advantage.lam.alpha is small for such short responses: lambda is below 0.5; raise alpha"
    if o.advantage.kind in ("raw", "std") and not o.filter.positives and recipe.reward.wrong == 0:
        yield (
            f"reward.wrong=0 with advantage.kind={o.advantage.kind}: wrong answers have no gradient, only right ones "
            "are learnt from; the papers use reward.correct=1 reward.wrong=-1"
        )
    if o.train_on == "sampled" and (rollout.top_p < 1 or rollout.top_k > 0):
        yield (
            "rollout.top_p / top_k truncate the sampling distribution: the learner's log-probs are of the full one, "
            "so max_logprob_gap is not zero"
            + ("; use objective.off_policy.old=recomputed" if o.off_policy.old == "rollout" else "")
        )
    if o.policy.kind != "none" and recipe.learner.updates > rollout.prompts and o.structure == "group":
        yield f"learner.updates={recipe.learner.updates} is more than the {rollout.prompts} groups of a rollout"
    if o.policy.kind != "none" and o.off_policy.weight == "sequence":
        yield "objective.off_policy.weight=sequence multiplies ratios over the whole response: it collapses with length"
    yield from _step_warnings(recipe)


def _step_warnings(recipe: Recipe) -> Iterator[str]:
    """Parts that do nothing at the first optimiser step of a rollout, or go wrong after it."""
    o, steps = recipe.objective, recipe.learner.updates * recipe.learner.epochs
    at_once = o.off_policy.old != "rollout"
    if o.policy.kind == "clip" and o.policy.ratio == "sequence" and steps == 1 and at_once:
        yield "objective.policy.ratio=sequence has no effect with one optimiser step a rollout: every ratio is 1"
    if o.policy.kind == "cispo" and steps == 1 and at_once:
        yield "objective.policy.kind=cispo has no effect with one optimiser step a rollout: every ratio is 1"
    if o.kl_cov.coef and steps == 1 and at_once:
        yield "objective.kl_cov has no effect with one optimiser step a rollout: the policy is still the old one"
    if any(s.kind == "off_policy" for s in o.select) and steps == 1 and at_once:
        yield "objective.select kind=off_policy has no effect with one optimiser step a rollout"
    if o.policy.kind == "plain" and steps > 1 and not o.filter.positives:
        yield "objective.policy.kind=plain has no ratio: of several optimiser steps only the first is on-policy"
