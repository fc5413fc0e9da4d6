"""The published test vectors of the actor-critic family that stand nowhere else (float64, 1e-6)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from retool.objectives import Aggregation, Critic, Forward, KlPenalty, Objective
from retool.objectives.advantages import adaptive_lambda
from retool.objectives.estimators import Gae, LengthAdaptive
from retool.objectives.terms import NllTerm, PolicyTerm, ValueTerm
from tests.objectives.build_batches import F64, f64, ragged
from tests.objectives.test_vectors import close, tir, value_of


@pytest.mark.parametrize(
    ("length", "lam"),
    [(21, 0.047619), (40, 0.5), (100, 0.8), (200, 0.9), (400, 0.95), (1000, 0.98), (10000, 0.998)],
)
def test_tv_lagae(length: int, lam: float) -> None:
    close(adaptive_lambda(f64([length]), 0.05, 0.0, 1 - 1e-4), [lam])


def test_tv_lagae_sum_and_clamp() -> None:
    lam = float(adaptive_lambda(f64([400]), 0.05, 0.0, 1 - 1e-4))
    close(sum(lam**k for k in range(100_000)), 20.0)
    close(adaptive_lambda(f64([10, 20, 1]), 0.05, 0.0, 1 - 1e-4), [0, 0, 0])
    close(adaptive_lambda(f64([10]), 0.05, 0.5, 1 - 1e-4), [0.5])
    close(adaptive_lambda(f64([10**9]), 0.05, 0.0, 1 - 1e-4), [1 - 1e-4])


def test_tv_lagae_each_row_has_its_own_lambda() -> None:
    """Tool tokens do not count towards the length, and a longer neighbour changes nothing."""
    values = [[0.5, 0.6, 0.4, 7.0, 7.0, 0.9], [0.1] * 6]
    batch = ragged([[1, 1, 1, 0, 0, 1], [1] * 6], {"critic_value": values}, score=[1.0, 0.0])
    out = Gae(lam=LengthAdaptive(0.5), whiten=False)(batch)
    close(out["advantage"][:6], [0.1375, 0.075, 0.55, 0, 0, 0.1])


VAPO = ([[1, 1, 1, 1]], {"critic_value": [[0.5, 0.6, 0.4, 0.9]]})


@pytest.mark.parametrize(
    ("lam", "lam_value", "advantage", "target"),
    [
        (LengthAdaptive(0.5), 1.0, [0.1375, 0.075, 0.55, 0.1], [1, 1, 1, 1]),
        (LengthAdaptive(0.5), 0.5, [0.1375, 0.075, 0.55, 0.1], [0.6375, 0.675, 0.95, 1]),
        (0.95, 1.0, [0.4469875, 0.36525, 0.595, 0.1], [1, 1, 1, 1]),
    ],
)
def test_tv_vapo(lam: float | LengthAdaptive, lam_value: float, advantage: list[float], target: list[float]) -> None:
    out = Gae(lam=lam, lam_value=lam_value, whiten=False)(ragged(*VAPO, score=[1.0]))
    close(out["advantage"], advantage)
    close(out["return"], target)


NLL_MASK = [[1, 1, 1], [1, 1], [1]]
NLL_LOGP = [-0.1, -0.2, -0.3, -0.5, -0.5, -0.4]


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        (NllTerm(positives=True), 0.25),
        (NllTerm(positives=True, aggregation=Aggregation("seq_mean_token_mean")), 0.30),
    ],
)
def test_tv_nll(term: NllTerm, expected: float) -> None:
    close(value_of(term, ragged(NLL_MASK, accuracy=[1, 0, 1]), f64(NLL_LOGP)), expected)


def test_tv_nll_over_all_tokens_would_be_smaller() -> None:
    batch = ragged(NLL_MASK, accuracy=[1, 0, 1])
    planned, _ = NllTerm(positives=True).plan(batch, [], (), None)
    close(NllTerm(positives=True).numerator(planned, Forward(logp=f64(NLL_LOGP))) / 6, 0.1666667)


def test_tv_nll_with_tv_tir() -> None:
    batch, logp = tir()
    batch = batch.with_samples(accuracy=f64([1, 0]))
    policy = value_of(PolicyTerm(clip_low=0.2, clip_high=0.28), batch, logp)
    nll = value_of(NllTerm(positives=True), batch, logp)
    close(nll, 0.6661274)
    close(policy + 0.1 * nll, -0.4683873)


def test_tv_nll_counts_positives_over_the_whole_mini_batch() -> None:
    """Split into micro-batches, one of them without a positive: the same number; none at all: exactly 0."""
    term = NllTerm(positives=True)
    planned, denominator = term.plan(ragged(NLL_MASK, accuracy=[1, 0, 1]), [], (), None)
    logp = f64(NLL_LOGP).split([3, 2, 1])
    parts = [term.numerator(planned.take([i]), Forward(logp=logp[i])) for i in range(3)]
    close(sum(parts) / denominator, 0.25)  # type: ignore[arg-type]
    assert float(parts[1]) == 0.0
    objective = Objective("nll", Gae(), (term,))
    final = objective.finalize(ragged(NLL_MASK, accuracy=[0, 0, 0]), objective.initial_state())
    numerator = objective.loss(final.batch, Forward(logp=f64(NLL_LOGP)))["nll"]
    assert final.scale("nll") == 0.0 and float(final.scale("nll") * numerator) == 0.0


def test_tv_ev_of_critic_in_other_units() -> None:
    """The metric compares in units of the reward, whatever units the critic predicts in."""
    objective = Objective("ev", Gae(whiten=False), (ValueTerm(),), critic=Critic(normalise=True))
    state = objective.initial_state()
    weight = 1 - 0.99995
    state = replace(state, value_mean=0.5 * weight, value_square=0.5 * weight, value_weight=weight)  # mean ½, std ½
    values = (f64([0.8, 0.3, 0.6, 0.1]) - 0.5) / 0.5
    batch = ragged([[1]] * 4, score=[1, 0, 1, 0]).with_tokens(value=values)
    _, _, metrics = objective.prepare(batch, state)
    close(metrics["value/explained_variance"], 0.71)


def test_adaptive_kl_reads_the_sum_over_a_sample() -> None:
    """A §0.6: KL 12 nats a sample, target 6, H 10000, 256 samples: β 0.1 → 0.100512, used from the next rollout on."""
    kl = KlPenalty("reward", "k1", 0.1, target=6.0, horizon=10_000.0)
    objective = Objective("adaptive", Gae(whiten=False), (PolicyTerm(),), kl=kl)
    batch = ragged([[1, 1, 0]] * 256)
    columns = {"logp_old": [-1.0, -1.0, 55.0], "logp_ref": [-8.0, -6.0, 3.0]}
    tokens = {k: torch.tensor(v * 256, dtype=F64) for k, v in columns.items()}
    batch = batch.with_tokens(**tokens, critic_value=torch.zeros(768, dtype=F64))
    prepared, state, metrics = objective.prepare(batch, objective.initial_state())
    assert metrics["kl/beta"] == 0.1
    close(state.beta, 0.100512)
    close(prepared["kl_reward"][:3], [-0.7, -0.5, 0])
    assert math.isclose(metrics["kl/reference"], 6.0)
