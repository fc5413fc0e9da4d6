"""Combinations that make no sense are refused by name when the recipe loads (A appendix B, B §11)."""

from __future__ import annotations

from collections.abc import Iterator

from retool.config import Recipe
from retool.config.objective import LambdaConfig
from retool.config.reward import reward_errors, reward_warnings
from retool.objectives.base import ObjectiveError
from retool.objectives.presets import find_preset

GROUP_KINDS = ("zscore", "mean", "rloo")


def validate(recipe: Recipe) -> list[str]:
    """Warnings about a recipe's objective. Raises `ObjectiveError` listing everything that cannot be run."""
    find_preset(recipe.objective.preset)
    if errors := list(_errors(recipe)):
        raise ObjectiveError("; ".join(errors))
    return list(_warnings(recipe))


def _errors(recipe: Recipe) -> Iterator[str]:
    yield from _advantage_errors(recipe)
    yield from _loss_errors(recipe)
    yield from _leash_errors(recipe)
    yield from _off_policy_errors(recipe)
    yield from reward_errors(recipe)


def _advantage_errors(recipe: Recipe) -> Iterator[str]:
    o, g = recipe.objective, recipe.rollout.group_size
    if o.advantage.kind in GROUP_KINDS and g < 2:
        yield f"objective.advantage.kind={o.advantage.kind} compares within a group: rollout.group_size must be >= 2"
    if o.filter.kind != "keep" and g < 2:
        yield f"objective.filter.kind={o.filter.kind} looks at groups: rollout.group_size must be >= 2"
    if o.advantage.kind == "gae" and o.critic.kind == "none":
        yield "objective.advantage.kind=gae needs values: set objective.critic.kind=policy"
    if o.advantage.kind != "gae" and o.critic.kind != "none":
        yield f"objective.critic is never used by advantage.kind={o.advantage.kind}: set objective.critic.kind=none"
    if o.advantage.kind != "gae" and o.advantage.bootstrap_on_truncation:
        yield "objective.advantage.bootstrap_on_truncation needs a critic: advantage.kind=gae"
    if isinstance(o.advantage.lam, float) and not 0 <= o.advantage.lam <= 1:
        yield f"objective.advantage.lam={o.advantage.lam} must be in [0, 1]"
    if o.critic.kind == "none" and (o.critic.normalise or o.critic.warmup):
        yield "objective.critic.normalise and .warmup need objective.critic.kind=policy"


def _loss_errors(recipe: Recipe) -> Iterator[str]:
    o = recipe.objective
    if o.policy.kind != "none" and o.advantage.kind == "none":
        yield "objective.policy.kind=clip needs advantages: choose objective.advantage.kind"
    if o.policy.kind == "none" and o.advantage.kind != "none":
        yield f"objective.advantage.kind={o.advantage.kind} has no reader: set it to none, or policy.kind=clip"
    own_terms = find_preset(o.preset).compose is not None
    if o.policy.kind == "none" and not (o.nll.coef or o.pair.coef or o.entropy_coef or own_terms):
        yield "the objective has no term: set policy.kind, nll.coef, pair.coef or entropy_coef"
    if o.aggregation.mode == "const" and o.aggregation.const_length is None:
        yield "objective.aggregation.mode=const needs objective.aggregation.const_length (longest response in tokens)"
    if o.kl.aggregation == "const" and o.aggregation.const_length is None:
        yield "objective.kl.aggregation=const needs objective.aggregation.const_length"
    if o.pair.coef and o.structure != "pairs":
        yield "objective.pair needs objective.structure=pairs"
    if o.pair.coef and o.policy.kind != "none":
        yield "objective.pair takes no advantages: set objective.policy.kind=none"
    if o.structure == "pairs" and not o.pair.coef:
        yield "objective.structure=pairs needs objective.pair.coef > 0"
    if o.select and o.policy.kind == "none":
        yield "objective.select chooses tokens of the policy term: policy.kind=none has none"
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
    if o.advantage.whiten and o.advantage.kind in GROUP_KINDS:
        yield "objective.advantage.whiten is ignored: group advantages are normalised already"
    if isinstance(o.advantage.lam, LambdaConfig) and rollout.max_tokens < 2 / o.advantage.lam.alpha:
        yield "objective.advantage.lam.alpha is small for such short responses: lambda is below 0.5; raise alpha"
    if o.policy.kind != "none" and o.policy.ratio == "sequence" and recipe.learner.updates * recipe.learner.epochs == 1:
        yield "objective.policy.ratio=sequence has no effect with one optimiser step a rollout: every ratio is 1"
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
