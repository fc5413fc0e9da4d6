"""The published test vectors of the parts that the presets are made of (float64, 1e-6)."""

from __future__ import annotations

import math

import pytest
import torch

from retool.objectives import Aggregation, Batch, Critic, Forward, ObjectiveState, OffPolicy
from retool.objectives.advantages import gae, group_advantage, reward_to_go, token_rewards, whiten
from retool.objectives.aggregate import Mode
from retool.objectives.estimators import Gae, GroupRelative, LengthAdaptive
from retool.objectives.kl import adapt_beta, kl_estimate
from retool.objectives.off_policy import importance
from retool.objectives.surrogate import clip_fractions, clip_surrogate
from retool.objectives.terms import KlTerm, NllTerm, PolicyTerm
from retool.objectives.value import explained_variance, moments, update_moments, value_loss
from tests.objectives.build_batches import f64, ragged


def close(actual: torch.Tensor | float, expected: list[float] | float, tol: float = 1e-6) -> None:
    torch.testing.assert_close(torch.as_tensor(actual, dtype=torch.float64), f64_any(expected), rtol=0, atol=tol)


def f64_any(values: list[float] | float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def logs(rows: list[list[float]]) -> list[list[float]]:
    return [[math.log(x) for x in row] for row in rows]


def value_of(term: PolicyTerm | KlTerm | NllTerm, batch: Batch, logp: torch.Tensor) -> float:
    planned, denominator = term.plan(batch, [(batch.spread("in_loss"), "kept")], (), None)
    return float(term.numerator(planned, Forward(logp=logp)) / denominator)


# TV-TIR: the policy loss around a tool span
TIR_MASK = [[1, 1, 1, 0, 0, 1, 1, 1], [1, 1, 0]]
TIR_OLD = [[0.5, 0.5, 0.5, 0.9, 0.9, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
TIR_NEW = [[0.5, 0.6, 0.7, 0.01, 0.99, 0.5, 0.35, 0.5], [0.55, 0.4, 0.5]]


def tir(mask: list[list[int]] = TIR_MASK) -> tuple[Batch, torch.Tensor]:
    batch = ragged(mask, {"logp_old": logs(TIR_OLD), "advantage": [[1.0] * 8, [-1.0] * 3]})
    return batch, f64([x for row in logs(TIR_NEW) for x in row])


@pytest.mark.parametrize(
    ("mode", "expected"), [("token_mean", -0.535), ("seq_mean_token_mean", -0.04), ("seq_mean_token_sum", -2.14)]
)
def test_tv_tir(mode: Mode, expected: float) -> None:
    batch, logp = tir()
    term = PolicyTerm(aggregation=Aggregation(mode), clip_low=0.2, clip_high=0.28)
    close(value_of(term, batch, logp), expected)


def test_tv_tir_diagnostics() -> None:
    batch, logp = tir()
    sums = PolicyTerm(clip_low=0.2, clip_high=0.28).diagnostics(batch, Forward(logp=logp))
    close((sums["clip_low"] + sums["clip_high"]) / 8, 0.125)
    close(sums["approx_kl"] / 8, -0.0042857, 1e-7)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("token_mean", -0.539111), ("seq_mean_token_mean", 0.0193056), ("seq_mean_token_sum", -2.695556)],
)
def test_tv_tir_wrong_mask_is_visible(mode: Mode, expected: float) -> None:
    """With the attention mask in the place of the action mask the numbers differ: the vector would catch it."""
    batch, logp = tir([[1] * 8, [1, 1, 0]])
    term = PolicyTerm(aggregation=Aggregation(mode), clip_low=0.2, clip_high=0.28)
    close(value_of(term, batch, logp), expected, 1e-5)


# TV-GAE: generalised advantages with a tool token in the middle, KL in the reward
def gae_batch(beta: float = 0.1) -> Batch:
    batch = ragged([[1, 1, 0, 1, 1]], {"critic_value": [[0.2, 0.4, 7.0, 0.5, 0.8]]}, score=[1.0])
    old, ref = f64([-1, -0.5, 3.3, -0.2, -0.4]), f64([-1.2, -0.4, -9.9, -0.5, -0.4])
    kl = torch.where(batch["action"], kl_estimate(old, ref, "k1"), 0.0)
    return batch.with_tokens(kl_reward=-beta * kl)


@pytest.mark.parametrize(
    ("beta", "lam", "advantage"),
    [
        (0.1, 1.0, [0.76, 0.58, 0, 0.47, 0.2]),
        (0.1, 0.95, [0.69965, 0.547, 0, 0.46, 0.2]),
        (0.1, 0.5, [0.3275, 0.295, 0, 0.37, 0.2]),
        (0.0, 1.0, [0.8, 0.6, 0, 0.5, 0.2]),
        (0.0, 0.95, [0.737225, 0.5655, 0, 0.49, 0.2]),
    ],
)
def test_tv_gae(beta: float, lam: float, advantage: list[float]) -> None:
    out = Gae(lam=lam, lam_value=lam, whiten=False)(gae_batch(beta))
    close(out["advantage"], advantage)
    values = [0.2, 0.4, 0, 0.5, 0.8]
    close(out["return"], [a + v for a, v in zip(advantage, values)])


def test_tv_gae_rewards() -> None:
    close(token_rewards(gae_batch()), [-0.02, 0.01, 0, -0.03, 1])


def test_tv_whiten() -> None:
    batch = gae_batch()
    plain = Gae(lam=0.95, whiten=False)(batch)["advantage"]
    close(plain[batch["action"]].mean(), 0.4766625)
    biased = whiten(plain, batch["action"], unbiased=False, eps=0)
    close(biased, [1.229881, 0.387944, 0, -0.091902, -1.525924])
    unbiased = whiten(plain, batch["action"], unbiased=True, eps=0)
    close(unbiased, [1.065108, 0.33597, 0, -0.079589, -1.321489])
    close(Gae(lam=0.95)(batch)["advantage"], unbiased.tolist())


def test_tv_boot() -> None:
    batch = ragged([[1, 1, 1]], {"critic_value": [[0.3, 0.4, 0.5]]}, score=[0.0], truncated=[True])
    lam = f64([0.95])
    r, v, m = token_rewards(batch), batch["critic_value"], batch["action"]
    close(gae(r, v, m, batch, 1.0, lam), [-0.25625, -0.375, -0.5])
    close(gae(r, v, m, batch, 1.0, lam, f64([0.6])), [0.28525, 0.195, 0.1])
    option = Gae(lam=0.95, whiten=False, bootstrap=True)
    close(option(batch.with_samples(critic_bootstrap=f64([0.6])))["advantage"], [0.28525, 0.195, 0.1])
    finished = batch.with_samples(critic_bootstrap=f64([0.6]), truncated=torch.tensor([False]))
    close(option(finished)["advantage"], [-0.25625, -0.375, -0.5])


def test_tv_boot_beside_a_longer_row() -> None:
    """A short row's bootstrap value must survive the steps of a longer neighbour."""
    values = {"critic_value": [[0.3, 0.4, 0.5], [0.1] * 6]}
    batch = ragged([[1, 1, 1], [1] * 6], values, score=[0.0, 1.0], truncated=[True, False])
    option = Gae(lam=0.95, whiten=False, bootstrap=True)
    out = option(batch.with_samples(critic_bootstrap=f64([0.6, 9.0])))["advantage"]
    close(out[:3], [0.28525, 0.195, 0.1])
    close(out[-1], 0.9)


def test_tv_vapo_decoupled_lambda() -> None:
    batch = ragged([[1, 1, 1, 1]], {"critic_value": [[0.5, 0.6, 0.4, 0.9]]}, score=[1.0])
    out = Gae(lam=LengthAdaptive(0.5), lam_value=1.0, whiten=False)(batch)
    close(out["advantage"], [0.1375, 0.075, 0.55, 0.1])
    close(out["return"], [1, 1, 1, 1])


def test_tv_vclip() -> None:
    loss = value_loss(f64([1, 0.1, 0.55]), f64([0.4] * 3), f64([0.9] * 3), 0.2)
    close(loss, [0.045, 0.32, 0.06125])
    close(loss.mean(), 0.1420833)


def test_tv_clip() -> None:
    ratio, advantage = f64([1.5, 1.5, 0.5, 0.5, 1.3, 1.0]), f64([1, -1, 1, -1, 1, -1])
    close(clip_surrogate(ratio, advantage, 0.2, 0.2), [-1.2, 1.5, -0.5, 0.8, -1.2, 1.0])
    close(clip_surrogate(ratio, advantage, 0.2, 0.2).mean(), 0.0666667)
    close(clip_surrogate(ratio, advantage, 0.2, 0.28), [-1.28, 1.5, -0.5, 0.8, -1.28, 1.0])
    close(clip_surrogate(ratio, advantage, 0.2, 0.28).mean(), 0.04)
    for dual, expected in ((3.0, 3.0), (10.0, 8.0), (None, 8.0)):
        close(clip_surrogate(f64([8]), f64([-1]), 0.2, 0.2, dual), [expected])
    low, high = clip_fractions(ratio, advantage, 0.2, 0.28)
    assert low.tolist() == [False, False, False, True, False, False]
    assert high.tolist() == [True, False, False, False, True, False]


def test_tv_kl() -> None:
    zero = f64([0.0])
    close(kl_estimate(f64([0.5]), zero, "k1"), [0.5])
    close(kl_estimate(f64([0.5]), zero, "k2"), [0.125])
    close(kl_estimate(f64([0.5]), zero, "k3"), [0.1065307])
    close(kl_estimate(f64([-0.8]), zero, "k1"), [-0.8])
    close(kl_estimate(f64([-0.8]), zero, "k2"), [0.32])
    close(kl_estimate(f64([-0.8]), zero, "k3"), [0.4255409])
    close(kl_estimate(f64([-0.8]), zero, "abs_k1"), [0.8])


@pytest.mark.parametrize(("name", "slope"), [("k1", 1.0), ("k2", 0.5), ("k3", 0.3934693), ("k3_st", 0.5)])
def test_tv_kl_gradients(name: str, slope: float) -> None:
    logp = f64([0.5]).requires_grad_()
    value = kl_estimate(logp, f64([0.0]), name)  # type: ignore[arg-type]
    value.sum().backward()
    close(logp.grad, [slope])  # type: ignore[arg-type]
    if name == "k3_st":
        close(value.detach(), [0.1065307])


def test_tv_kl_expectations() -> None:
    p, q = f64([0.7, 0.2, 0.1]), f64([0.5, 0.3, 0.2])
    for name, expected in (("k1", 0.0851228), ("k3", 0.0851228), ("k2", 0.0800876)):
        close((p * kl_estimate(p.log(), q.log(), name)).sum(), expected)  # type: ignore[arg-type]


def test_tv_ev() -> None:
    close(explained_variance(f64([1, 0, 1, 0]), f64([0.8, 0.3, 0.6, 0.1])), 0.71)


@pytest.mark.parametrize(("kl", "beta"), [(12.0, 0.100512), (6.0, 0.1), (3.0, 0.099488)])
def test_adaptive_controller(kl: float, beta: float) -> None:
    close(adapt_beta(0.1, kl, 256, 6.0, 10_000.0), beta)


def advantages(scores: list[float], kind: str, std: str = "sample", eps: float = 1e-6) -> torch.Tensor:
    n = len(scores)
    counted = torch.ones(n, dtype=torch.bool)
    return group_advantage(f64(scores), torch.zeros(n), counted, kind, std, eps)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scores", "population", "sample", "mean", "rloo"),
    [
        ([1, 0, 0, 1], [0.999998, -0.999998], [0.866024, -0.866024], [0.5, -0.5], [0.666667, -0.666667]),
        ([1, -1, -1, -1], [1.732049, -0.57735], [1.499999, -0.5], [1.5, -0.5], [2, -0.666667]),
        ([1] + [0] * 7, [2.645743, -0.377963], [2.474867, -0.353552], [0.875, -0.125], [1, -0.142857]),
    ],
)
def test_tv_grpo_advantages(
    scores: list[float], population: list[float], sample: list[float], mean: list[float], rloo: list[float]
) -> None:
    for kind, std, expected in (
        ("zscore", "population", population),
        ("zscore", "sample", sample),
        ("mean", "sample", mean),
        ("rloo", "sample", rloo),
    ):
        close(advantages(scores, kind, std)[:2], expected)


def test_tv_grpo_more_advantages() -> None:
    close(advantages([1, 0, 0, 1], "zscore", "sample", 1e-4)[0], 0.865875)
    close(advantages([2, 1, 1, 0], "zscore", "population"), [1.414212, 0, 0, -1.414212])
    for kind in ("zscore", "mean", "rloo"):
        close(advantages([0.3, 0.3, 0.3], kind), [0, 0, 0])
        close(advantages([0.1 + 0.2, 0.3, 0.3], kind, eps=0.0), [0, 0, 0])
        close(advantages([5.0], kind), [0])


GRPO_MASK = [[1, 1], [1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("mode", "policy", "kl", "total"),
    [("seq_mean_token_mean", -0.0875, 0.0079896, -0.0871804), ("token_mean", 0.25, 0.0080437, 0.2503217)],
)
def test_tv_grpo_loss(mode: Mode, policy: float, kl: float, total: float) -> None:
    half = [[0.5] * 2, [0.5] * 4]
    columns = {"logp_old": logs(half), "logp_ref": logs(half), "advantage": [[1.0] * 2, [-1.0] * 4]}
    batch = ragged(GRPO_MASK, columns)
    logp = f64([x for row in logs([[0.6, 0.5], [0.5, 0.45, 0.4, 0.5]]) for x in row])
    agg = Aggregation(mode)
    pg, leash = value_of(PolicyTerm(aggregation=agg), batch, logp), value_of(KlTerm(aggregation=agg), batch, logp)
    close(pg, policy)
    close(leash, kl)
    close(pg + 0.04 * leash, total)


@pytest.mark.parametrize(
    ("agg", "expected"), [(Aggregation("seq_mean_token_sum"), 0.75), (Aggregation("const", 4), 0.1875)]
)
def test_tv_grpo_other_aggregations(agg: Aggregation, expected: float) -> None:
    batch = ragged(GRPO_MASK, {"logp_old": logs([[0.5] * 2, [0.5] * 4]), "advantage": [[1.0] * 2, [-1.0] * 4]})
    logp = f64([x for row in logs([[0.6, 0.5], [0.5, 0.45, 0.4, 0.5]]) for x in row])
    close(value_of(PolicyTerm(aggregation=agg), batch, logp), expected)


@pytest.mark.parametrize(
    ("agg", "groups", "expected"),
    [
        (Aggregation("token_mean"), [0, 1], 2.5),
        (Aggregation("seq_mean_token_mean"), [0, 1], 3.0),
        (Aggregation("seq_mean_token_sum"), [0, 1], 5.0),
        (Aggregation("const", 6), [0, 1], 0.833333),
        (Aggregation("group_token_mean"), [0, 0], 2.5),
        (Aggregation("group_token_mean"), [0, 1], 3.0),
    ],
)
def test_tv_agg(agg: Aggregation, groups: list[int], expected: float) -> None:
    batch = ragged([[1, 1, 1], [1]], group=groups)
    weights, denominator = agg(batch, batch["action"], batch["action"])
    close((weights * f64([1, 2, 3, 4])).sum() / denominator, expected)


def test_tv_agg_const_counts_samples_without_actions() -> None:
    batch = ragged([[1, 1, 1], [1], [0, 0]])
    weights, denominator = Aggregation("const", 6)(batch, batch["action"], batch["action"])
    close((weights * f64([1, 2, 3, 4, 9, 9])).sum() / denominator, 10 / 18)
    with pytest.raises(ValueError, match="const_length"):
        Aggregation("const")(batch, batch["action"], batch["action"])


def test_tv_mb_numerators_add_up() -> None:
    """Two micro-batches of unlike lengths: the global token mean, not the mean of means (2.0)."""
    batch = ragged([[1] * 15, [1] * 15, [1] * 5, [1] * 5])
    planned, denominator = NllTerm().plan(batch, [], (), None)
    logp = -torch.cat([torch.ones(30), 3 * torch.ones(10)]).to(torch.float64)
    parts = [planned.take([0, 1]), planned.take([2, 3])]
    pieces = [NllTerm().numerator(p, Forward(logp=x)) for p, x in zip(parts, (logp[:30], logp[30:]))]
    close(sum(pieces) / denominator, 1.5)  # type: ignore[arg-type]


TIS = {"logp_old": [[-1.0, -2, -0.5, -3]], "logp_rollout": [[-1.0, -2.9, -0.4, -1]], "advantage": [[1.0] * 4]}


def test_tv_tis() -> None:
    batch = ragged([[1] * 4], TIS)
    rho = [1, 2.459603, 0.904837, 0.135335]
    weight, kept = importance(batch, OffPolicy(weight="token", cap=None))
    close(weight, rho)
    weight, kept = importance(batch, OffPolicy(weight="token", cap=2.0))
    close(weight, [1, 2, 0.904837, 0.135335])
    corrected = batch.with_tokens(off_policy_weight=weight, off_policy_kept=kept)
    close(value_of(PolicyTerm(), corrected, batch["logp_old"]), -1.0100432)
    close(value_of(PolicyTerm(), batch, batch["logp_old"]), -1.0)


def test_tv_tis_mis_and_its_two_denominators() -> None:
    batch = ragged([[1] * 4], TIS)
    weight, kept = importance(batch, OffPolicy(weight="token", cap=None, reject="token", low=0.5, high=2.0))
    assert kept.tolist() == [True, False, True, False]
    corrected = batch.with_tokens(off_policy_weight=weight, off_policy_kept=kept)
    close(value_of(PolicyTerm(rejection="all_act"), corrected, batch["logp_old"]), -0.4762094)
    close(value_of(PolicyTerm(rejection="kept"), corrected, batch["logp_old"]), -0.9524187)


def test_tv_tis_sequences() -> None:
    batch = ragged([[1] * 4], TIS)
    weight, _ = importance(batch, OffPolicy(weight="sequence", cap=2.0))
    close(weight, [0.3011942] * 4)
    for options, keeps in (
        (OffPolicy(reject="sequence", low=0.0, high=2.0), True),
        (OffPolicy(reject="geo", low=0.74, high=0.741), True),
        (OffPolicy(reject="geo", low=0.742, high=2.0), False),
    ):
        assert importance(batch, options)[1].tolist() == [keeps] * 4
    weight, kept = importance(batch, OffPolicy(weight="token", cap=2.0, normalise=True))
    close(weight[kept].mean(), 1.0)


def test_fixture_9_unknown_reward_leaves_group_statistics() -> None:
    batch = ragged([[1], [1], [1]], score=[1.0, 0.0, 0.0], group=[0, 0, 0], in_baseline=[True, False, True])
    out = GroupRelative("zscore", "population")(batch)
    close(out["advantage"][[0, 2]], [1, -1], 1e-5)
    dropped = GroupRelative("zscore", "population")(batch.take([0, 2]))
    close(dropped["advantage"], [1, -1], 1e-5)


def test_reward_to_go_skips_masked_tokens() -> None:
    batch = ragged([[1, 0, 1], [1, 1]])
    close(reward_to_go(f64([0.5, 99, 1, 2, 3]), batch["action"], batch), [1.5, 0, 1, 5, 3])


def test_value_moments_follow_the_returns() -> None:
    critic = Critic(normalise=True, decay=0.5, eps=1e-5)
    state = update_moments(ObjectiveState(), critic, f64([1, 3]))
    close(list(moments(state, critic)), [2.0, 1.0])
    state = update_moments(state, critic, f64([5, 5]))
    mean = (0.25 * 2 + 0.5 * 5) / 0.75
    square = (0.25 * 5 + 0.5 * 25) / 0.75
    close(list(moments(state, critic)), [mean, math.sqrt(square - mean**2)])
    assert ObjectiveState.from_json(state.to_json()) == state
