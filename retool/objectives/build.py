"""From the typed configuration to the objective that the learner runs."""

from __future__ import annotations

from dataclasses import replace

from retool.config import Recipe
from retool.config.objective import (
    AggregationName,
    CriticConfig,
    LambdaConfig,
    ObjectiveConfig,
    ReferenceConfig,
    SelectConfig,
)
from retool.objectives.aggregate import Aggregation
from retool.objectives.base import (
    AdvantageEstimator,
    Aside,
    Critic,
    KlPenalty,
    OffPolicy,
    Reference,
    Structure,
    Term,
    TokenSelector,
)
from retool.objectives.estimators import Gae, GroupRelative, LengthAdaptive, NoAdvantage, Raw
from retool.objectives.filters import AccuracyFilter
from retool.objectives.objective import Objective
from retool.objectives.presets import find_preset
from retool.objectives.selectors import EntropyQuantile, LowProbability, RandomTokens
from retool.objectives.terms import EntropyTerm, KlTerm, NllTerm, PairTerm, PolicyTerm, ValueTerm
from retool.objectives.validate import validate


def build_objective(recipe: Recipe) -> Objective:
    """The objective of a recipe whose preset has been merged. Raises `ObjectiveError` on illegal combinations."""
    validate(recipe)
    o = recipe.objective
    objective = Objective(
        name=o.preset,
        structure=Structure(o.structure),
        filter=AccuracyFilter(o.filter.kind),
        advantage=_advantage(o),
        select=tuple(_selector(s, recipe.seed) for s in o.select),
        terms=_terms(o),
        off_policy=OffPolicy(
            old=o.off_policy.old,
            weight=o.off_policy.weight,
            cap=o.off_policy.cap,
            reject=o.off_policy.reject,
            low=o.off_policy.low,
            high=o.off_policy.high,
            normalise=o.off_policy.normalise,
            rule=o.off_policy.denominator,
        ),
        kl=KlPenalty(
            place=o.kl.place,
            estimator=o.kl.estimator,
            beta=o.kl.beta,
            target=o.kl.target if o.kl.controller == "adaptive" else None,
            horizon=o.kl.horizon,
        ),
        reference=_reference(o.reference),
        critic=_critic(o.critic),
        filter_rule=o.filter.denominator,
        train_on=o.train_on,
        temperature=1.0 if o.train_on == "demo" else recipe.rollout.temperature,
        reward_clip=o.reward_clip,
        aside=Aside(NllTerm("ptx", o.ptx.coef), o.ptx.batch) if o.ptx.coef else None,
    )
    compose = find_preset(o.preset).compose
    objective = objective if compose is None else compose(objective)
    return _skip_scoring(objective, recipe)


def _skip_scoring(objective: Objective, recipe: Recipe) -> Objective:
    """With one optimiser step a rollout, recomputed old log-probs are the current ones: the pass that would compute
    them is left out, unless something before the loss reads them."""
    once = recipe.learner.updates * recipe.learner.epochs == 1
    if once and objective.off_policy.old == "recomputed" and not objective.early_old:
        return replace(objective, off_policy=replace(objective.off_policy, old="detached"))
    return objective


def _aggregation(o: ObjectiveConfig, mode: AggregationName | None = None) -> Aggregation:
    return Aggregation(mode or o.aggregation.mode, o.aggregation.const_length)


def _advantage(o: ObjectiveConfig) -> AdvantageEstimator:
    a = o.advantage
    if a.kind == "gae":
        lam = LengthAdaptive(a.lam.alpha, a.lam.min, a.lam.max) if isinstance(a.lam, LambdaConfig) else a.lam
        return Gae(a.gamma, lam, a.lam_value, a.whiten, a.whiten_var == "unbiased", a.bootstrap_on_truncation)
    if a.kind == "raw":
        return Raw()
    if a.kind == "none":
        return NoAdvantage()
    return GroupRelative(a.kind, a.std, a.eps)


def _reference(r: ReferenceConfig) -> Reference | None:
    if r.kind == "none":
        return None
    share, every = {"ema": (r.eta, 1), "mix": (r.alpha, 512), "hard": (1.0, 400), "frozen": (1.0, 1)}[r.kind]
    return Reference(r.kind, share, r.every or every, r.after)


def _critic(c: CriticConfig) -> Critic | None:
    return None if c.kind == "none" else Critic(c.normalise, c.decay, warmup=c.warmup, lr_factor=c.lr_factor)


def _selector(s: SelectConfig, seed: int) -> TokenSelector:
    if s.kind == "entropy":
        return EntropyQuantile(s.share, s.side, s.denominator)
    if s.kind == "low_probability":
        return LowProbability(s.below, s.denominator)
    return RandomTokens(s.share, seed, s.denominator)


def _terms(o: ObjectiveConfig) -> tuple[Term, ...]:
    terms: list[Term] = []
    agg = _aggregation(o)
    if o.policy.kind != "none":
        terms.append(
            PolicyTerm(
                aggregation=agg,
                clip_low=o.policy.clip_low,
                clip_high=o.policy.clip_high,
                dual_clip=o.policy.dual_clip,
                ratio=o.policy.ratio,
                rejection=o.off_policy.denominator,
            )
        )
    if o.kl.place == "loss":
        kl_agg = _aggregation(o, o.kl.aggregation)
        terms.append(KlTerm(coef=o.kl.beta, aggregation=kl_agg, estimator=o.kl.estimator))
    if o.entropy_coef:
        terms.append(EntropyTerm(coef=o.entropy_coef, aggregation=agg))
    if o.nll.coef:
        nll_agg = agg if o.train_on == "demo" else Aggregation("token_mean")
        terms.append(NllTerm(coef=o.nll.coef, aggregation=nll_agg, positives=o.nll.positives))
    if o.pair.coef:
        terms.append(
            PairTerm(coef=o.pair.coef, beta=o.pair.beta, loss=o.pair.loss, label_smoothing=o.pair.label_smoothing)
        )
    if o.critic.kind != "none":
        terms.append(ValueTerm(aggregation=Aggregation("token_mean"), clip=o.critic.value_clip))
    return tuple(terms)
