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
    GroupFilter,
    KlPenalty,
    ObjectiveError,
    OffPolicy,
    Reference,
    Structure,
    Term,
    TokenSelector,
)
from retool.objectives.dotted import imported
from retool.objectives.estimators import (
    Gae,
    GroupRelative,
    LengthAdaptive,
    NoAdvantage,
    Ones,
    Raw,
    Returns,
    TurnReturns,
)
from retool.objectives.filters import AccuracyFilter, Filters, ResampleOnCorrect, SampleMask
from retool.objectives.objective import Objective
from retool.objectives.presets import find_preset
from retool.objectives.selectors import (
    ClipCovariance,
    EntropyQuantile,
    LowProbability,
    OffPolicyMask,
    RandomTokens,
    TopCovariance,
)
from retool.objectives.terms import EntropyTerm, KlTerm, NllTerm, PairTerm, PolicyTerm, ValueTerm
from retool.objectives.tracker import Tracker
from retool.objectives.validate import const_length, validate


def build_objective(recipe: Recipe) -> Objective:
    """The objective of a recipe whose preset has been merged. Raises `ObjectiveError` on illegal combinations."""
    validate(recipe)
    o = recipe.objective
    objective = Objective(
        name=o.preset,
        structure=Structure(o.structure),
        filter=_filter(o, recipe.seed),
        advantage=_advantage(o),
        select=tuple(_selector(s, o, recipe.seed) for s in o.select),
        terms=_terms(o, const_length(recipe)),
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


def _aggregation(o: ObjectiveConfig, length: int | None, mode: AggregationName | None = None) -> Aggregation:
    return Aggregation(mode or o.aggregation.mode, length)


def _filter(o: ObjectiveConfig, seed: int) -> GroupFilter:
    """Groups first, then the resampling inside them, then single samples."""
    f = o.filter
    parts: list[GroupFilter] = [AccuracyFilter(f.kind, f.groups)]
    if f.roc is not None:
        parts.append(ResampleOnCorrect(f.roc, seed))
    if f.positives or f.void != "keep" or f.overlong != "keep":
        parts.append(SampleMask(f.positives, f.void != "keep", f.overlong != "keep", f.overlong_in_baseline))
    if f.custom is not None:
        own = imported(f.custom, "objective.filter.custom")
        if not callable(own):
            raise ObjectiveError(f"objective.filter.custom: {f.custom!r} is a {type(own).__name__}, not a function")
        parts.append(own)
    return parts[0] if len(parts) == 1 else Filters(tuple(parts))


def _advantage(o: ObjectiveConfig) -> AdvantageEstimator:
    a = o.advantage
    if a.kind == "gae":
        lam = LengthAdaptive(a.lam.alpha, a.lam.min, a.lam.max) if isinstance(a.lam, LambdaConfig) else a.lam
        return Gae(a.gamma, lam, a.lam_value, a.whiten, a.whiten_var == "unbiased", a.bootstrap_on_truncation)
    if a.kind == "returns":
        return Returns(a.gamma, a.baseline == "group", a.whiten, a.whiten_var == "unbiased")
    if a.kind == "turns":
        return TurnReturns(a.gamma, a.std, a.eps)
    if a.kind == "tracker":
        return Tracker(o.tracker.min_keep, o.tracker.max_keep, o.tracker.half_life, a.eps)
    if a.kind == "raw":
        return Raw()
    if a.kind == "ones":
        return Ones()
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


def _selector(s: SelectConfig, o: ObjectiveConfig, seed: int) -> TokenSelector:
    if s.kind == "entropy":
        return EntropyQuantile(s.share, s.side, s.denominator, s.scope, s.source)
    if s.kind == "low_probability":
        return LowProbability(s.below, s.denominator)
    if s.kind == "off_policy":
        return OffPolicyMask(s.delta, s.denominator)
    if s.kind == "clip_cov":
        clip = (o.policy.clip_low, o.policy.clip_high)
        return ClipCovariance(s.share, s.low, s.high, *clip, seed, s.denominator, s.source)
    return RandomTokens(s.share, seed, s.denominator)


def _terms(o: ObjectiveConfig, length: int | None) -> tuple[Term, ...]:
    terms: list[Term] = []
    agg = _aggregation(o, length)
    if o.policy.kind != "none":
        terms.append(
            PolicyTerm(
                aggregation=agg,
                kind=o.policy.kind,
                clip_low=o.policy.clip_low,
                clip_high=o.policy.clip_high,
                dual_clip=o.policy.dual_clip,
                cap=o.policy.cap,
                tau_pos=o.policy.tau_pos,
                tau_neg=o.policy.tau_neg,
                ratio=o.policy.ratio,
                rejection=o.off_policy.denominator,
            )
        )
    if o.kl_cov.coef:
        top = TopCovariance(o.kl_cov.share, source=o.kl_cov.source)
        terms.append(KlTerm("kl_cov", o.kl_cov.coef, agg, (top,), estimator=o.kl_cov.form, against="logp_old"))
    if o.kl.place == "loss":
        kl_agg = _aggregation(o, length, o.kl.aggregation)
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
