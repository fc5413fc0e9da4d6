"""Vectors of algorithms that no preset offers yet: the contracts must already hold them."""

from __future__ import annotations

import pytest
import torch

from retool.objectives import Aggregation, Batch, Forward, MissingColumn, Objective, ObjectiveError, Structure
from retool.objectives.advantages import whiten
from retool.objectives.base import Term
from retool.objectives.estimators import NoAdvantage
from retool.objectives.ratio import sequence_ratio, token_ratio
from retool.objectives.selectors import EntropyQuantile, LowProbability, RandomTokens, TopCovariance, token_covariance
from retool.objectives.terms import EntropyTerm, KlTerm, NllTerm, PairTerm, PolicyTerm
from tests.objectives.build_batches import f64, ragged


def close(actual: torch.Tensor | float, expected: list[float] | float, tol: float = 1e-6) -> None:
    expected_ = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(actual, dtype=torch.float64), expected_, rtol=0, atol=tol)


def total(terms: tuple[Term, ...], batch: Batch, logp: torch.Tensor) -> torch.Tensor:
    """The loss as the learner adds it up, for a batch whose columns are already prepared."""
    objective = Objective("test", NoAdvantage(), terms)
    final = objective.finalize(batch, objective.initial_state(), Forward(logp=logp.detach()))
    numerators = objective.loss(final.batch, Forward(logp=logp))
    return sum((final.scale(n) * x for n, x in numerators.items()), start=torch.zeros((), dtype=logp.dtype))


# TV-DPO
DPO = {"logp_ref": [[-5.0, -6.0, 123.0], [-11.5, 7.0]]}
DPO_LOGP = [-4.0, -6.0, 9.9, -12.0, 55.0]


def dpo_batch() -> Batch:
    return ragged([[1, 1, 0], [1, 0]], DPO, score=[1.0, 0.0], pair=[3, 3])


@pytest.mark.parametrize(
    ("beta", "loss", "smoothed", "ipo", "slope"),
    [(0.1, 0.6209570, 0.6359570, 12.25, -0.0462570), (0.5, 0.3868710, 0.4618710, 0.25, -0.1604107)],
)
def test_tv_dpo(beta: float, loss: float, smoothed: float, ipo: float, slope: float) -> None:
    logp = f64(DPO_LOGP).requires_grad_()
    value = total((PairTerm(beta=beta),), dpo_batch(), logp)
    close(value.detach(), loss)
    value.backward()
    assert logp.grad is not None
    close(logp.grad, [slope, slope, 0, -slope, 0])
    close(total((PairTerm(beta=beta, label_smoothing=0.1),), dpo_batch(), logp).detach(), smoothed)
    close(total((PairTerm(beta=beta, loss="ipo"),), dpo_batch(), logp).detach(), ipo)


def test_pairs_match_wherever_they_stand() -> None:
    batch = ragged([[1]] * 4, {"logp_ref": [[0.0]] * 4}, score=[0.0, 1.0, 1.0, 0.0], pair=[8, 5, 8, 5])
    chosen, up, down = PairTerm().margins(batch, f64([-4, -1, -3, -2]))
    assert sorted(zip(batch["pair"][chosen].tolist(), up.tolist(), down.tolist())) == [(5, -1, -2), (8, -3, -4)]
    masked = batch.with_samples(in_loss=torch.tensor([True, True, False, True]))
    assert PairTerm().plan(masked, [], (), None)[1] == 1.0
    assert [a.rows for a in Structure("pairs").atoms(batch)] == [(0, 2), (1, 3)]


def test_pairs_refuse_what_is_no_pair() -> None:
    with pytest.raises(ObjectiveError, match="pair 3 has 1"):
        Structure("pairs").atoms(dpo_batch().take([0]))
    with pytest.raises(ObjectiveError, match="same score"):
        PairTerm().plan(dpo_batch().with_samples(score=f64([1, 1])), [], (), None)
    with pytest.raises(ObjectiveError, match="split"):
        PairTerm().numerator(dpo_batch().take([0]), Forward(logp=f64([0, 0, 0])))


# T3a: KL-Cov
T3A = {"advantage": [[1.0, 1, 1, -1, -1, -1]], "logp_old": [[-0.15, -0.2, -3, -0.1, -1, -1.8]]}
T3A_LOGP = f64([-0.1, -0.2, -3, -0.1, -1, -2])


def kl_cov(share: float) -> tuple[Term, ...]:
    leash = KlTerm("kl_cov", 1.0, select=(TopCovariance(share),), estimator="abs_k1", against="logp_old")
    return PolicyTerm(clip_low=None, clip_high=None), leash


def test_t3a_covariance() -> None:
    batch = ragged([[1] * 6], T3A)
    cov = token_covariance(T3A_LOGP, batch["advantage"], batch["action"])
    close(cov, [0.966667, 0.866667, -1.933333, -0.966667, -0.066667, 0.933333])
    now = Forward(logp=T3A_LOGP)
    assert TopCovariance(1 / 6)(batch, batch["action"], now).nonzero()[:, 0].tolist() == [0]
    assert TopCovariance(2 / 6)(batch, batch["action"], now).nonzero()[:, 0].tolist() == [0, 5]


def test_t3a_kl_cov_loss() -> None:
    batch = ragged([[1] * 6], T3A)
    close(total(kl_cov(1 / 6)[:1], batch, T3A_LOGP), -0.038757)
    close(total(kl_cov(1 / 6), batch, T3A_LOGP), -0.030423)


def test_t3a_tool_tokens_are_no_population() -> None:
    """Very unlikely tool tokens in between change no covariance and no choice."""
    columns = {name: [[*row[0][:3], -77.0, -99.0, *row[0][3:]]] for name, row in T3A.items()}
    batch = ragged([[1, 1, 1, 0, 0, 1, 1, 1]], columns)
    logp = torch.cat([T3A_LOGP[:3], f64([-50, -60]), T3A_LOGP[3:]])
    close(total(kl_cov(1 / 6), batch, logp), -0.030423)
    cov = token_covariance(logp, batch["advantage"], batch["action"])
    close(cov, [0.966667, 0.866667, -1.933333, 0, 0, -0.966667, -0.066667, 0.933333])


# T10: GSPO
def test_t10_gspo() -> None:
    batch = ragged([[1] * 4], {"logp_old": [[-1.0] * 4], "advantage": [[1.0] * 4]})
    logp = f64([-0.9, -1.2, -0.8, -1])
    close(sequence_ratio(logp, batch["logp_old"], batch["action"], batch), [1.025315] * 4)
    close(token_ratio(logp, batch["logp_old"], batch["action"]), [1.105171, 0.818731, 1.221403, 1])
    agg = Aggregation("seq_mean_token_mean")
    term = PolicyTerm(aggregation=agg, clip_low=3e-4, clip_high=4e-4, ratio="sequence")
    close(total((term,), batch, logp), -1.0004)
    spaced = ragged([[1, 1, 0, 1, 1]], {"logp_old": [[-1.0, -1, 40, -1, -1]], "advantage": [[1.0, 1, 9, 1, 1]]})
    close(total((term,), spaced, f64([-0.9, -1.2, 7, -0.8, -1])), -1.0004)


# T1: SPO's loss
def test_t1a_spo_loss() -> None:
    p = [0.95, 0.5, 0.99, 0.8, 0.97, 0.3, 0.92, 0.6, 0.99, 0.2]
    advantage = [[0, 0.3, 0, 0.3, 0, -0.5, 0, -0.5, 0, 0.8]]
    batch = ragged([[1] * 10], {"logp_old": [f64(p).log().tolist()], "advantage": advantage})
    select = LowProbability(0.9)
    chosen = select(batch, batch["action"], None)
    assert chosen.nonzero()[:, 0].tolist() == [1, 3, 5, 7, 9]
    close(whiten(batch["advantage"], chosen)[chosen], [0.387699, 0.387699, -1.022116, -1.022116, 1.268833], 1e-5)
    term = PolicyTerm(select=(select,))
    close(total((term,), batch, batch["logp_old"]), -0.08)
    ratios = f64([1, 1.1, 1, 0.7, 1, 1.3, 1, 1.3, 1, 1.0])
    close(total((term,), batch, batch["logp_old"] + ratios.log()), -0.008)


def test_t1b_spo_loss_with_a_tool() -> None:
    p = [0.99, 0.5, 0.95, 0.7, 0.1, 0.1, 0.1, 0.6, 0.98, 0.3]
    mask = [1, 1, 1, 1, 0, 0, 0, 1, 1, 1]
    advantage = [[0.375] * 4 + [0.0] * 3 + [0.25] * 3]
    batch = ragged([mask], {"logp_old": [f64(p).log().tolist()], "advantage": advantage})
    close(total((PolicyTerm(select=(LowProbability(0.9),)),), batch, batch["logp_old"]), -0.3125)


# T2: entropy selection
def test_t2_entropy_quantile() -> None:
    h = [[0.01, 2.0, 0.3, 0.0, 9.0], [0.7, 0.02, 1.1, 0.05, 0.4], [0.6, 0.03, 9.0, 9.0, 9.0]]
    mask = [[1, 1, 1, 1, 0], [1] * 5, [1, 1, 0, 0, 0]]
    advantage = [[1.0] * 5, [-1.0] * 5, [0.5] * 5]
    batch = ragged(mask, {"entropy": h, "advantage": advantage, "logp_old": [[0.0] * 5] * 3})
    chosen = EntropyQuantile(0.2)(batch, batch["action"], None)
    assert chosen.nonzero()[:, 0].tolist() == [1, 5, 7]
    ratio = torch.ones(15, dtype=torch.float64)
    ratio[1], ratio[7] = 1.5, 0.5
    kept, over_all = EntropyQuantile(0.2, rule="kept"), EntropyQuantile(0.2, rule="all_act")
    close(total((PolicyTerm(clip_high=0.28, select=(kept,)),), batch, ratio.log()), 0.173333)
    close(total((PolicyTerm(clip_high=0.28, select=(over_all,)),), batch, ratio.log()), 0.047273)


def test_selectors_compose_and_keep_their_rules() -> None:
    columns = {"logp_old": [f64([0.5, 0.5, 0.99, 0.99]).log().tolist()], "entropy": [[3.0, 0.0, 2.0, 0.1]]}
    batch = ragged([[1] * 4], columns | {"advantage": [[1.0] * 4]})
    both = (LowProbability(0.9, rule="kept"), EntropyQuantile(0.5, rule="all_act"))
    close(total((PolicyTerm(select=both),), batch, batch["logp_old"]), -0.5)


def test_random_tokens_are_keyed_not_positioned() -> None:
    batch = ragged([[1] * 400, [1] * 500])
    select = RandomTokens(0.2, seed=5)
    chosen = select(batch, batch["action"], None)
    assert 0.15 < float(chosen.double().mean()) < 0.25
    turned = batch.take([1, 0])
    again = select(turned, turned["action"], None)
    assert torch.equal(again, torch.cat([chosen[400:], chosen[:400]]))
    assert not torch.equal(chosen, RandomTokens(0.2, seed=6)(batch, batch["action"], None))


def test_tv_nll() -> None:
    logp = f64([-0.1, -0.2, -0.3, -0.5, -0.5, -0.4])
    batch = ragged([[1] * 3, [1] * 2, [1]], accuracy=[1.0, 0.0, 1.0])
    close(total((NllTerm(positives=True),), batch, logp), 0.25)
    close(total((NllTerm(positives=True, aggregation=Aggregation("seq_mean_token_mean")),), batch, logp), 0.30)
    nobody = batch.with_samples(accuracy=f64([0, 0, 0]))
    close(total((NllTerm(positives=True),), nobody, logp), 0.0)


def test_entropy_needs_an_entropy() -> None:
    batch = ragged([[1]])
    planned, _ = EntropyTerm().plan(batch, [], (), None)
    with pytest.raises(MissingColumn, match="entropy"):
        EntropyTerm().numerator(planned, Forward(logp=f64([0])))
    close(EntropyTerm().numerator(planned, Forward(entropy=f64([1.5]))), -1.5)
