"""The `objective` section: which algorithm, and every choice it is made of."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from retool.config.base import Section

AggregationName = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "group_token_mean", "const"]
RuleName = Literal["kept", "all_act"]


class FilterConfig(Section):
    """Which samples are learnt from, decided on raw accuracy before scoring."""

    kind: Literal["keep", "drop", "mask_loss"] = "keep"
    """What happens to the `groups` named below: `keep` them, `drop` them, or `mask_loss` (they stay in the
    statistics)."""
    groups: Literal["uniform", "all_wrong", "all_right"] = "uniform"
    """Groups that `kind` is about: all answers alike (wrong or right), only all wrong, or only all right."""
    positives: bool = False
    """Only right answers are learnt from (RAFT); the others stay in the statistics."""
    void: Literal["keep", "mask_loss"] = "keep"
    """Trajectories with a turn that holds neither a complete call nor an answer: `mask_loss` takes all of their tokens
    out of the loss; they stay in the group's statistics (SimpleTIR)."""
    overlong: Literal["keep", "mask_loss"] = "keep"
    """Truncated trajectories: `mask_loss` takes them out of the loss (DAPO's overlong filter)."""
    overlong_in_baseline: bool = True
    """Whether truncated trajectories that are masked stay in the group's mean and deviation."""
    roc: float | None = Field(None, gt=0, lt=1)
    """Share of each group that stays (rStar2's resample on correct): wrong answers at random, of the right ones those
    with the fewest failed calls and the cleanest answer; null is off."""
    custom: str | None = None
    """Your own filter, `module:NAME`: called with the batch after the others, it returns the samples that stay (some
    perhaps with `in_loss` off) and metrics, as `GroupFilter` in retool/objectives/base.py says."""
    denominator: RuleName = "kept"
    """Whether samples that are masked from the loss leave the denominators (`kept`) or stay in them (`all_act`)."""


class LambdaConfig(Section):
    """λ of GAE per sample: 1 - 1/(alpha · action tokens), clamped to [min, max]."""

    alpha: float = Field(0.05, gt=0)
    """Share of a response that credit reaches back over."""
    min: float = Field(0.0, ge=0, le=1)
    """Smallest λ; short responses would get a negative one."""
    max: float = Field(1 - 1e-4, ge=0, le=1)
    """Largest λ."""


class AdvantageConfig(Section):
    """From scores to advantages."""

    kind: Literal["gae", "zscore", "mean", "rloo", "std", "raw", "ones", "returns", "turns", "tracker", "none"] = (
        "zscore"
    )
    """`gae` needs a critic. `zscore`, `mean`, `rloo` compare with the group; `std` divides by its deviation without
    taking the mean off. `raw` is the score, `ones` is 1 (with `filter.positives`). `returns` sums token rewards to the
    end, `turns` turn rewards, normalised in the group. `tracker` compares with what the problem gave before. `none` for
    imitation and pairs."""
    baseline: Literal["none", "group"] = "none"
    """For `returns`: take the group's mean off the score first."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount between action tokens (`gae`, `returns`) or between turns (`turns`)."""
    lam: float | LambdaConfig = 1.0
    """λ of the policy's advantages: a number, or `{alpha, min, max}` for one that adapts to the length."""
    lam_value: float = Field(1.0, ge=0, le=1)
    """λ of the critic's target."""
    std: Literal["sample", "population", "none"] = "sample"
    """Standard deviation of `zscore`, `std` and `turns`."""
    eps: float = Field(1e-6, ge=0)
    """Added to the group's standard deviation."""
    whiten: bool = False
    """Zero mean, unit variance over the action tokens of the whole rollout; for `gae` and `returns`."""
    whiten_var: Literal["unbiased", "biased"] = "unbiased"
    """Variance used by `whiten`."""
    bootstrap_on_truncation: bool = False
    """The return of a truncated sample ends with the critic's value of its last state instead of 0."""


class TrackerConfig(Section):
    """The value that `advantage.kind=tracker` keeps for each problem."""

    min_keep: float = Field(0.875, ge=0, lt=1)
    """Least share of the past that one visit leaves; a new problem starts with 1/(1 - min_keep) observations."""
    max_keep: float = Field(0.96, ge=0, le=1)
    """Largest share of the past that one visit leaves."""
    half_life: float = Field(0.06, gt=0)
    """Drift of the policy on the problem, in nats a token, that halves the past."""


class PolicyConfig(Section):
    """The policy-gradient term."""

    kind: Literal["clip", "cispo", "sapo", "plain", "none"] = "clip"
    """`clip`: the clipped surrogate. `cispo`: the clipped ratio weighs the gradient of log π, so no token loses it.
    `sapo`: a sigmoid in the place of the clip. `plain`: -A log π without a ratio. `none`: no policy gradient
    (imitation, pairs)."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio of each token, or the geometric mean over the sequence (GSPO)."""
    clip_low: float | None = Field(0.2, ge=0)
    """ε below 1; null opens that side. For `clip` and `cispo`."""
    clip_high: float | None = Field(0.2, ge=0)
    """ε above 1; null opens that side. For `clip` and `cispo`."""
    cap: float | None = Field(None, gt=0)
    """For `cispo`: the largest ratio itself, with no bound below (5.0 is the same as clip_high 4.0, clip_low null)."""
    tau_pos: float = Field(1.0, gt=0)
    """Temperature of `sapo` where the advantage is positive."""
    tau_neg: float = Field(1.05, gt=0)
    """Temperature of `sapo` elsewhere; larger lets go of a token sooner."""
    dual_clip: float | None = Field(None, gt=1)
    """Bound c on the loss of tokens with negative advantage (at most -c·A); null is off, as in the papers."""


class AggregationConfig(Section):
    """How token losses become one number."""

    mode: AggregationName = "token_mean"
    """`token_mean` over the mini-batch; `seq_mean_token_mean` and `seq_mean_token_sum` give every sequence the same
    vote; `group_token_mean` every group; `const` divides by samples × `const_length`."""
    const_length: int | None = Field(None, ge=1)
    """The constant C of `const`, in tokens; default: `rollout.max_tokens`."""


class KlConfig(Section):
    """The leash to the reference policy."""

    place: Literal["none", "reward", "loss"] = "none"
    """In the token rewards, as a term of the loss, or nowhere."""
    estimator: Literal["k1", "k2", "k3", "k3_st"] = "k1"
    """k1 = d, k2 = d²/2, k3 = e^-d + d - 1; `k3_st` has k3's value and k2's gradient."""
    beta: float = Field(0.0, ge=0)
    """Coefficient, the first one with an adaptive controller."""
    controller: Literal["fixed", "adaptive"] = "fixed"
    """`adaptive` steers the KL of a sample (sum over its action tokens) towards `target`."""
    target: float | None = Field(None, gt=0)
    """Wanted KL in nats a sample."""
    horizon: float = Field(10_000.0, gt=0)
    """Samples over which the controller reacts."""
    aggregation: AggregationName | None = None
    """Aggregation of the loss term; default: as the policy term."""


class SelectConfig(Section):
    """A token selector of the policy term. Several compose by AND."""

    kind: Literal["entropy", "low_probability", "random", "clip_cov", "off_policy"]
    """`entropy`: tokens of highest or lowest entropy. `low_probability`: tokens the policy was unsure of. `random`: a
    random share (the control). `clip_cov`: all but a few random ones of high covariance between log-prob and advantage.
    `off_policy`: all but sequences of negative advantage that the policy has already moved away from."""
    share: float = Field(0.2, gt=0, le=1)
    """Share of the tokens that is chosen (`entropy`, `random`) or left out (`clip_cov`)."""
    scope: Literal["minibatch", "rollout", "sequence"] = "minibatch"
    """For `entropy`: where the share is taken."""
    source: Literal["old", "current"] = "old"
    """For `entropy` and `clip_cov`: of the policy before the first update, or of the one being updated."""
    side: Literal["top", "bottom"] = "top"
    """For `entropy`."""
    below: float = Field(0.9, gt=0, le=1)
    """For `low_probability`: old probability below which a token counts."""
    low: float = 1.0
    """For `clip_cov`: covariance above which a token may be left out."""
    high: float = 5.0
    """For `clip_cov`: covariance below which a token may be left out."""
    delta: float = Field(0.5, gt=0)
    """For `off_policy`: mean of log π_old - log π over the sequence above which it is left out."""
    denominator: RuleName = "kept"
    """Whether dropped tokens leave the denominator (`kept`) or stay in it (`all_act`)."""


class KlCovConfig(Section):
    """A penalty on the tokens that cost most entropy (KL-Cov): divergence from the old policy."""

    coef: float = Field(0.0, ge=0)
    """Weight of the penalty; 0 is off."""
    share: float = Field(2e-3, gt=0, le=1)
    """Share (a fraction, not a percentage) of the tokens, those of highest covariance; at least one token."""
    form: Literal["abs_k1", "k2", "k3"] = "abs_k1"
    """Estimator of the divergence; `abs_k1` is the absolute log-ratio."""
    source: Literal["current", "old"] = "current"
    """Whose log-probs enter the covariance."""


class NllConfig(Section):
    """Imitation of the batch's own tokens."""

    coef: float = Field(0.0, ge=0)
    """Weight of the term; 0 is off."""
    positives: bool = False
    """Only right answers, in numerator and denominator."""


class PairConfig(Section):
    """Preference pairs (DPO)."""

    coef: float = Field(0.0, ge=0)
    """Weight of the term; 0 is off."""
    beta: float = Field(0.1, gt=0)
    """Strength of the implicit KL."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """-log σ(z), or IPO's square."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs taken to be labelled the wrong way round."""


class OffPolicyConfig(Section):
    """Old log-probs, and the gap between the engine that sampled and the learner that trains."""

    old: Literal["recomputed", "rollout", "detached"] = "recomputed"
    """`recomputed` by the learner before the first update (also called decoupled), the engine's own (`rollout`, also
    called bypass), or `detached`: the current ones without gradient, for one optimiser step a rollout."""
    weight: Literal["none", "token", "sequence"] = "none"
    """Importance weight learner/engine of a token (TIS) or of the whole sequence."""
    cap: float | None = Field(2.0, gt=0)
    """Weights are truncated here; null is off."""
    reject: Literal["none", "token", "sequence", "geo"] = "none"
    """Drop tokens (MIS), sequences, or sequences by the geometric mean of their ratio, outside [low, high]."""
    low: float = Field(0.5, ge=0)
    """Smallest accepted ratio."""
    high: float = Field(2.0, gt=0)
    """Largest accepted ratio."""
    normalise: bool = False
    """Divide the weights by their mean over accepted tokens."""
    denominator: RuleName = "all_act"
    """Whether rejected tokens leave the denominator (`kept`) or stay in it (`all_act`)."""


class ReferenceConfig(Section):
    """The policy that KL terms and pairs compare with."""

    kind: Literal["none", "frozen", "ema", "hard", "mix"] = "none"
    """`frozen`: the weights that training started from. `ema`: it follows the policy slowly. `hard`: it becomes the
    policy every so often. `mix`: it jumps part of the way every so often."""
    eta: float = Field(0.001, gt=0, le=1)
    """Of `ema`: the policy's share in each move."""
    alpha: float = Field(0.6, gt=0, le=1)
    """Of `mix`: the policy's share in each move."""
    every: int | None = Field(None, ge=1)
    """Updates (or rollouts, see `after`) between two moves; default: 1 for `ema`, 400 for `hard`, 512 for `mix`."""
    after: Literal["update", "rollout"] = "update"
    """What `every` counts: optimiser steps of the policy, or rollouts it learnt from."""


class PretrainConfig(Section):
    """A phase before the first step: the policy is frozen and only the critic learns, from Monte-Carlo returns."""

    steps: int = Field(0, ge=0)
    """Most rollouts of the phase; 0 leaves it out."""
    min_explained_variance: float = Field(0.5, le=1)
    """The phase may end early once the held-out explained variance has reached this; 1: it takes all its steps."""
    patience: int = Field(3, ge=1)
    """It then ends after so many evaluations in a row that did not improve on the best one."""
    every: int = Field(5, ge=1)
    """Rollouts between two evaluations (and checkpoints) of the critic."""
    held_out: float = Field(0.1, gt=0, lt=1)
    """Share of the problems that this phase never trains on; at most `rollout.prompts` of them are sampled, once."""


class CriticConfig(Section):
    """The value network."""

    kind: Literal["none", "policy", "reward_model", "checkpoint"] = "none"
    """What it starts from. `policy`: a copy of the policy's backbone with a fresh scalar head. `reward_model`: what
    `retool sft` with `sft.head` made. `checkpoint`: a saved critic (`RUN/critic`) or a learner checkpoint that holds
    one (`RUN/checkpoints/N`)."""
    path: str | None = None
    """Folder of the reward model or checkpoint."""
    lr_factor: float = Field(2.0, gt=0)
    """Critic learning rate as a multiple of `learner.lr`, where `learner.critic_lr` is not set."""
    value_clip: float | None = Field(0.2, gt=0)
    """Clip of the value around its old output; null is off."""
    normalise: bool = False
    """Predict returns in units of their moving mean and deviation."""
    decay: float = Field(0.99995, gt=0, lt=1)
    """Decay of those moments, a rollout."""
    warmup: int = Field(0, ge=0)
    """Rollouts at the start in which only the critic learns."""
    pretrain: PretrainConfig = PretrainConfig()
    """Value pretraining before the first step."""


class PtxConfig(Section):
    """Imitation of cold-start traces beside RL, in the same optimiser step."""

    coef: float = Field(0.0, ge=0)
    """Weight of the term; 0 is off."""
    data: str | None = None
    """JSONL of traces; default: the traces of the `sft` section."""
    batch: int = Field(32, ge=1)
    """Traces an optimiser step."""


class ObjectiveConfig(Section):
    """The algorithm: a preset, and whatever the recipe changes about it."""

    preset: str = "grpo"
    """Name of the preset whose values fill everything not written in the recipe, or `module:NAME` of your own."""
    structure: Literal["flat", "group", "pairs"] = "flat"
    """How samples belong together."""
    train_on: Literal["sampled", "demo"] = "sampled"
    """Tokens the policy sampled, or (imitation) demonstrated ones as well; tool output never."""
    filter: FilterConfig = FilterConfig()
    """Which groups are learnt from."""
    advantage: AdvantageConfig = AdvantageConfig()
    """From scores to advantages."""
    tracker: TrackerConfig = TrackerConfig()
    """Values of problems, for `advantage.kind=tracker`."""
    select: tuple[SelectConfig, ...] = ()
    """Token selectors of the policy term."""
    policy: PolicyConfig = PolicyConfig()
    """The policy-gradient term."""
    aggregation: AggregationConfig = AggregationConfig()
    """How token losses become one number."""
    kl: KlConfig = KlConfig()
    """The leash to the reference."""
    kl_cov: KlCovConfig = KlCovConfig()
    """The penalty of KL-Cov."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus (negative: a penalty); 0 is off."""
    nll: NllConfig = NllConfig()
    """Imitation term."""
    pair: PairConfig = PairConfig()
    """Preference term."""
    off_policy: OffPolicyConfig = OffPolicyConfig()
    """Old log-probs and off-policy correction."""
    reference: ReferenceConfig = ReferenceConfig()
    """The reference policy."""
    critic: CriticConfig = CriticConfig()
    """The value network."""
    reward_clip: float | None = Field(None, gt=0)
    """Scores are cut to ±this before a KL is added; null is off."""
    ptx: PtxConfig = PtxConfig()
    """Imitation of traces beside RL."""
