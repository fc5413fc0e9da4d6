"""Vectors of the presets without a critic: T2, T3, T4 and T10 (float64; 1e-6, or 1e-4 for four digits)."""

from __future__ import annotations

import math

import pytest
import torch

from retool.config import Recipe
from retool.objectives import (
    Aggregation,
    Batch,
    Forward,
    Objective,
    ObjectiveState,
    OffPolicy,
    build_objective,
    preset_fragment,
    priorities,
)
from retool.objectives.advantages import discounted_returns, turn_returns
from retool.objectives.base import Term
from retool.objectives.estimators import GroupRelative, NoAdvantage, Returns, TurnReturns
from retool.objectives.filters import ResampleOnCorrect, SampleMask
from retool.objectives.off_policy import importance
from retool.objectives.preset import over
from retool.objectives.ratio import sequence_ratio
from retool.objectives.selectors import ClipCovariance, EntropyQuantile, OffPolicyMask, TopCovariance
from retool.objectives.terms import KlTerm, PolicyTerm
from retool.objectives.tracker import Tracker
from tests.objectives.build_batches import f64, ragged


def close(actual: torch.Tensor | float, expected: list[float] | float, tol: float = 1e-6) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(actual, dtype=torch.float64), wanted, rtol=0, atol=tol)


def total(terms: tuple[Term, ...], batch: Batch, logp: torch.Tensor) -> torch.Tensor:
    """The loss as the learner adds it up, for a batch whose columns are already prepared."""
    objective = Objective("test", NoAdvantage(), terms)
    final = objective.finalize(batch, objective.initial_state(), Forward(logp=logp.detach()))
    numerators = objective.loss(final.batch, Forward(logp=logp))
    return sum((final.scale(n) * x for n, x in numerators.items()), start=torch.zeros((), dtype=logp.dtype))


# T2: entropy selection, further scopes and sources
T2_H = [[0.01, 2.0, 0.3, 0.0, 9.0], [0.7, 0.02, 1.1, 0.05, 0.4], [0.6, 0.03, 9.0, 9.0, 9.0]]
T2_MASK = [[1, 1, 1, 1, 0], [1] * 5, [1, 1, 0, 0, 0]]


def test_t2_scopes() -> None:
    batch = ragged(T2_MASK, {"entropy": T2_H})
    action = batch["action"]
    assert EntropyQuantile(0.2, scope="sequence")(batch, action, None).nonzero()[:, 0].tolist() == [1, 7, 10]
    rollout = EntropyQuantile(0.2, scope="rollout")
    prepared = rollout.prepare(batch)
    assert rollout(prepared, action, None).nonzero()[:, 0].tolist() == [1, 5, 7]
    part = prepared.take([0, 2])  # of a mini-batch the rollout's choice, not a fifth of its own tokens
    assert rollout(part, part["action"], None).nonzero()[:, 0].tolist() == [1]
    assert EntropyQuantile(0.2)(part, part["action"], None).nonzero()[:, 0].tolist() == [1, 5]
    bottom = EntropyQuantile(0.8, "bottom")(batch, action, None)
    assert int(bottom.sum()) == 9 and not bottom[[1, 7]].any()


def test_t2_current_entropy_is_asked_for_and_used() -> None:
    select = EntropyQuantile(0.2, source="current")
    assert select.current == {"entropy"} and not select.reads
    batch = ragged(T2_MASK)
    now = Forward(entropy=f64([x for row in T2_H for x in row]))
    assert select(batch, batch["action"], now).nonzero()[:, 0].tolist() == [1, 5, 7]


def test_selectors_choose_from_what_filters_leave() -> None:
    columns = {"entropy": [[5.0, 4.0], [3.0, 0.1]], "advantage": [[1.0] * 2] * 2, "logp_old": [[0.0] * 2] * 2}
    batch = ragged([[1, 1], [1, 1]], columns, in_loss=[False, True])
    objective = Objective("x", NoAdvantage(), (PolicyTerm(select=(EntropyQuantile(0.5),)),))
    final = objective.finalize(batch, ObjectiveState())
    assert final.batch["weight/policy"].tolist() == [0, 0, 1, 0]


# T3a: Clip-Cov, and where covariances come from
T3A = {"advantage": [[1.0, 1, 1, -1, -1, -1]], "logp_old": [[-0.15, -0.2, -3, -0.1, -1, -1.8]]}
T3A_LOGP = f64([-0.1, -0.2, -3, -0.1, -1, -2])


def clip_cov(low: float, seed: int = 0) -> PolicyTerm:
    return PolicyTerm(select=(ClipCovariance(1e-3, low, 5.0, 0.2, 0.2, seed),))


def test_t3a_clip_cov() -> None:
    batch = ragged([[1] * 6], T3A)
    close(total((clip_cov(1.0),), batch, T3A_LOGP), -0.038757)
    drawn = {}
    for seed in range(40):
        select = clip_cov(0.5, seed).select[0]
        left = ~select(batch, batch["action"], Forward(logp=T3A_LOGP))
        (index,) = left.nonzero()[:, 0].tolist()
        drawn[index] = float(total((clip_cov(0.5, seed),), batch, T3A_LOGP))
    assert drawn == pytest.approx({0: 0.136455, 1: 0.127910, 5: -0.175212}, abs=1e-6)


def test_t3a_what_the_clip_has_taken_is_not_eligible() -> None:
    """Token 0 moved up by more than 20 % under a positive advantage: it has no gradient to lose."""
    batch = ragged([[1] * 6], {**T3A, "logp_old": [[-0.5, -0.2, -3, -0.1, -1, -1.8]]})
    for seed in range(20):
        left = ~clip_cov(0.5, seed).select[0](batch, batch["action"], Forward(logp=T3A_LOGP))
        assert left.nonzero()[:, 0].tolist() in ([1], [5])


def test_t3a_kl_cov_by_recipe() -> None:
    fragment = over(preset_fragment("kl_cov"), objective={"kl_cov": {"share": 1 / 6}})
    terms = build_objective(Recipe(**fragment)).terms
    assert [t.name for t in terms] == ["policy", "kl_cov"]
    batch = ragged([[1] * 6], T3A)
    close(total(terms, batch, T3A_LOGP), -0.030423)
    old = KlTerm("kl_cov", 1.0, select=(TopCovariance(2 / 6, source="old"),), estimator="abs_k1", against="logp_old")
    assert old.current == frozenset() and "logp_old" in old.reads
    chosen = old.select[0](batch, batch["action"], None)
    assert chosen.nonzero()[:, 0].tolist() == [0, 1]  # with current log-probs 0 and 5


def test_t3b_entropy_change_is_minus_the_covariance() -> None:
    z, eta = f64([1, 0, -1]), 1e-3
    pi = torch.softmax(z, 0)
    advantage = f64([1, -0.5, -1])
    advantage = advantage - (pi * advantage).sum()
    close(advantage, [0.547154, -0.952846, -1.452846])

    def entropy(logits: torch.Tensor) -> torch.Tensor:
        return -(torch.softmax(logits, 0) * torch.log_softmax(logits, 0)).sum()

    def covariance(x: torch.Tensor) -> torch.Tensor:
        mean = (pi * x).sum()
        return (pi * (pi.log() - (pi * pi.log()).sum()) * (x - mean)).sum()

    for step, change, predicted in (
        (pi * advantage, -0.154258, -0.154235),
        (advantage, -0.494924, -0.494790),
    ):
        close((entropy(z + eta * step) - entropy(z)) / eta, change)
        close(-covariance(step), predicted)


# T4: the minimalist family on four groups
T4 = [[1, 1, -1, -1], [-1] * 4, [1] * 4, [1, -1, -1, -1]]
T4_CASES = {
    "reinforce": T4,
    "reinforce_mean_zero": [[1, 1, -1, -1], [0] * 4, [0] * 4, [1.5, -0.5, -0.5, -0.5]],
    "reinforce_rm_wrong": [T4[0], None, T4[2], T4[3]],
    "reinforce_rm_correct": [T4[0], T4[1], None, T4[3]],
    "reinforce_rej": [T4[0], None, None, T4[3]],
    "reinforce_std": [[0.8660, 0.8660, -0.8660, -0.8660], None, None, [1, -1, -1, -1]],
    "grpo": [[0.8660, 0.8660, -0.8660, -0.8660], [0] * 4, [0] * 4, [1.5, -0.5, -0.5, -0.5]],
    "raft": [[1, 1, None, None], None, [1] * 4, [1, None, None, None]],
    "raft_pp": [[1, 1, None, None], None, [1] * 4, [1, None, None, None]],
}


@pytest.mark.parametrize("name", T4_CASES)
def test_t4(name: str) -> None:
    """None: the sample, or its whole group, is not learnt from."""
    score = [float(r) for group in T4 for r in group]
    columns = {"logp_rollout": [[-1.0]] * 16, "logp_old": [[-1.0]] * 16, "logp_ref": [[-1.0]] * 16}
    accuracy = [float(r > 0) for r in score]
    batch = ragged([[1]] * 16, columns, score=score, accuracy=accuracy, group=[g for g in range(4) for _ in range(4)])
    batch = batch.with_samples(index=torch.arange(16))
    objective = build_objective(Recipe(**preset_fragment(name)))
    kept, _ = objective.filter(batch)
    kept, _, _ = objective.prepare(kept, objective.initial_state())
    got: list[float | None] = [None] * 16
    for index, value, inside in zip(kept["index"].tolist(), kept["advantage"].tolist(), kept["in_loss"].tolist()):
        got[index] = value if inside else None
    expected = [x for group in T4_CASES[name] for x in (group or [None] * 4)]
    assert [x is None for x in got] == [x is None for x in expected]
    assert [x for x in got if x is not None] == pytest.approx([x for x in expected if x is not None], abs=1e-4)


def test_t4_deviations_of_zero_one_rewards() -> None:
    batch = ragged([[1]] * 4, score=[1.0, 0, 0, 0], group=[0] * 4)
    close(GroupRelative("zscore", "sample")(batch)["advantage"], [1.5, -0.5, -0.5, -0.5], 1e-4)
    close(GroupRelative("zscore", "population")(batch)["advantage"], [1.732, -0.5774, -0.5774, -0.5774], 1e-4)


@pytest.mark.parametrize(("rule", "expected"), [("kept", 0.4), ("all_act", 0.2)])
def test_t4_raft_and_its_two_denominators(rule: str, expected: float) -> None:
    fragment = over(preset_fragment("raft"), objective={"filter": {"denominator": rule}})
    objective = build_objective(Recipe(**fragment))
    batch = ragged([[1]] * 4, score=[1.0, 1, -1, -1], accuracy=[1.0, 1, 0, 0], group=[0] * 4)
    batch, _ = objective.filter(batch)
    batch, state, _ = objective.prepare(batch, objective.initial_state())
    final = objective.finalize(batch, state)
    loss = objective.loss(final.batch, Forward(logp=f64([-0.5, -0.3, -1, -0.2])))["policy"]
    close(loss * final.scale("policy"), expected)


def test_t4_raft_pp() -> None:
    batch = ragged([[1]] * 2, {"advantage": [[1.0]] * 2, "logp_old": [[0.0]] * 2})
    close(total((PolicyTerm(),), batch, f64([1.4, 0.6]).log()), -0.9)


# T10: the neighbours
T10 = {"logp_old": [[-1.0] * 4], "advantage": [[1.0] * 4]}
T10_LOGP = f64([-0.9, -1.2, -0.8, -1])


def test_t10_cispo() -> None:
    batch = ragged([[1] * 4], T10)
    close(total((PolicyTerm(kind="cispo", clip_low=None, clip_high=0.2),), batch, T10_LOGP), 0.984283)
    close(total((PolicyTerm(kind="cispo", cap=1.2),), batch, T10_LOGP), 0.984283)
    logp = T10_LOGP.clone().requires_grad_()
    total((PolicyTerm(kind="cispo", clip_low=0.1, clip_high=0.2),), batch, logp).backward()
    assert logp.grad is not None
    close(logp.grad, [-1.105171 / 4, -0.9 / 4, -1.2 / 4, -0.25])


def test_t10_sapo() -> None:
    for sign, expected in ((1.0, -2.036201), (-1.0, 1.940950)):
        batch = ragged([[1] * 4], {**T10, "advantage": [[sign] * 4]})
        close(total((PolicyTerm(kind="sapo"),), batch, T10_LOGP), expected)
        at_one = batch["logp_old"].clone().requires_grad_()
        total((PolicyTerm(kind="sapo"),), batch, at_one).backward()
        assert at_one.grad is not None
        close(at_one.grad, [-sign / 4] * 4)


def test_t10_rloo() -> None:
    batch = ragged([[1]] * 4, score=[1.0, 0, 0, 1], group=[0] * 4)
    close(GroupRelative("rloo")(batch)["advantage"], [2 / 3, -2 / 3, -2 / 3, 2 / 3])


def test_t10_gspo_token_gradient() -> None:
    """Each token's own gradient, sg[s] exp(lp - sg lp), is the gradient of the sequence ratio under
    seq_mean_token_mean; and a token that a selector leaves out gets none."""
    batch = ragged([[1, 1, 0, 1, 1]], {"logp_old": [[-1.0] * 5], "advantage": [[1.0] * 5]})
    logp = f64([-0.9, -1.2, 7, -0.8, -1]).requires_grad_()
    agg = Aggregation("seq_mean_token_mean")
    total((PolicyTerm(aggregation=agg, clip_low=None, clip_high=None, ratio="sequence"),), batch, logp).backward()
    free = f64([-0.9, -1.2, -0.8, -1]).requires_grad_()
    (-torch.exp((free + 1).mean())).backward()
    assert logp.grad is not None and free.grad is not None
    close(logp.grad[batch["action"]], free.grad.tolist())
    close(logp.grad[2], 0.0)
    close(sequence_ratio(logp.detach(), batch["logp_old"], batch["action"], batch)[[0, 1, 3, 4]], [1.025315] * 4)
    alone = ragged([[1], [0, 1]], {"logp_old": [[-1.0], [0.0, -2.0]]})
    ratios = sequence_ratio(f64([-0.5, 9, -2.5]), alone["logp_old"], alone["action"], alone)
    close(ratios[[0, 2]], [math.exp(0.5), math.exp(-0.5)])


def test_t10_tis_and_mis() -> None:
    batch = ragged([[1, 1]], {"logp_old": [[-1.0, -2.0]], "logp_rollout": [[-1.2, -1.0]]})
    weight, kept = importance(batch, OffPolicy(weight="token", cap=2.0))
    close(weight, [1.221403, 0.367879])
    weight, kept = importance(batch, OffPolicy(weight="token", cap=None, reject="token", low=0.5, high=2.0))
    close(torch.where(kept, weight, 0.0), [1.221403, 0.0])


def test_t10_gtpo_returns() -> None:
    rewards = [[0.0, -0.1, 0, 0, 0.0, 0, 0.0]]
    batch = ragged([[1, 1, 0, 1, 1, 0, 1]], {"turn_reward": rewards}, score=[1.0])
    batch = batch.with_tokens(turn=torch.tensor([0, 0, 0, 1, 1, 1, 2]))
    returns, row, segment = turn_returns(batch, 0.9)
    close(returns, [0.71, 0.9, 1])
    assert row.tolist() == [0, 0, 0] and segment.tolist() == [0, 0, -1, 1, 1, -1, 2]


def test_gtpo_normalises_over_the_turns_of_the_group() -> None:
    rewards = [[-0.1, 0, 0.0], [0, 0.0, 0]]
    batch = ragged([[1, 0, 1], [1, 1, 1]], {"turn_reward": rewards}, score=[1.0, 0.0], group=[0, 0])
    batch = batch.with_tokens(turn=torch.tensor([0, 0, 1, 0, 0, 0]))
    out = TurnReturns(0.9, "population", 0.0)(batch)["advantage"]
    g = f64([0.8, 1.0, 0.0])
    z = ((g - g.mean()) / g.std(correction=0)).tolist()
    close(out, [z[0], 0, z[1], z[2], z[2], z[2]])
    bare = TurnReturns(0.9, "population", 0.0)(
        Batch(batch.offsets, {"action": batch["action"], "turn": batch["turn"]}, batch.samples)
    )
    g = f64([0.9, 1.0, 0.0])
    close(bare["advantage"][0], float((g[0] - g.mean()) / g.std(correction=0)))


def test_reinforce_pp_skips_masked_tokens() -> None:
    """r = [0, 0, 1], m = [1, 0, 1], γ = 0.5: the return of the first token is 0.5, not 0 (reset at the mask)."""
    batch = ragged([[1, 0, 1]], score=[1.0])
    close(discounted_returns(f64([0, 0, 1]), batch["action"], batch, 0.5), [0.5, 0, 1])
    close(Returns(gamma=0.5, whiten=False)(batch)["advantage"], [0.5, 0, 1])
    leashed = batch.with_tokens(kl_reward=f64([-0.2, 77, -0.4]))
    close(Returns(gamma=0.5, whiten=False)(leashed)["advantage"], [-0.2 + 0.5 * 0.6, 0, 0.6])


def test_reinforce_pp_baseline_whitens_over_the_batch() -> None:
    score = [1.0, 0, 5, 4]
    batch = ragged([[1], [1, 1], [1], [1, 1, 1]], score=score, group=[0, 0, 1, 1])
    out = Returns(baseline=True)(batch)["advantage"]
    raw = f64([0.5, -0.5, -0.5, 0.5, -0.5, -0.5, -0.5])
    close(out, ((raw - raw.mean()) / raw.std()).tolist())


# Filters
def members(**columns: list[object]) -> Batch:
    n = len(columns["accuracy"])
    defaults: dict[str, list[object]] = {
        "group": [0] * n,
        "tool_calls": [1] * n,
        "tool_error_rate": [0.0] * n,
        "format_penalty": [0.0] * n,
        "void": [False] * n,
        "truncated": [False] * n,
    }
    return ragged([[1]] * n, index=list(range(n)), **(defaults | columns))


def test_roc_keeps_clean_right_answers_and_random_wrong_ones() -> None:
    accuracy = [1.0] * 4 + [0.0] * 4
    calls, errors = [1, 1, 0, 1] + [1] * 4, [0.9, 0.0, 0.0, 0.2] + [0.0] * 4
    batch = members(accuracy=accuracy, tool_calls=calls, tool_error_rate=errors)
    kept = set()
    for seed in range(30):
        out, _ = ResampleOnCorrect(0.5, seed)(batch)
        rows = out["index"].tolist()
        assert [r for r in rows if r < 4] == [1, 3] and len(rows) == 4  # no call counts as half of the calls failed
        kept |= {r for r in rows if r >= 4}
    assert kept == {4, 5, 6, 7}
    repeated = members(accuracy=accuracy, format_penalty=[0.0, 1.0, 0.5, 0.0, 1, 1, 1, 1])
    assert [r for r in ResampleOnCorrect(0.5)(repeated)[0]["index"].tolist() if r < 4] == [0, 3]


@pytest.mark.parametrize(
    ("right", "wrong", "kept"),
    [(1, 7, (1, 3)), (7, 1, (3, 1)), (2, 6, (2, 2)), (8, 0, (4, 0)), (0, 8, (0, 4)), (4, 4, (2, 2)), (1, 1, (1, 0))],
)
def test_roc_leaves_some_of_each_sort(right: int, wrong: int, kept: tuple[int, int]) -> None:
    out, _ = ResampleOnCorrect(0.5)(members(accuracy=[1.0] * right + [0.0] * wrong))
    good = int((out["accuracy"] > 0.5).sum())
    assert (good, len(out) - good) in (kept, kept[::-1] if right == wrong else kept)


def test_sample_masks_stay_in_the_statistics() -> None:
    batch = members(accuracy=[1.0, 0, 1, 0], void=[True, False, False, False], truncated=[False, True, False, False])
    out, metrics = SampleMask(void=True, overlong=True)(batch)
    assert out["in_loss"].tolist() == [False, False, True, True] and out["in_baseline"].all()
    assert metrics == {"filter/void": 0.25, "filter/overlong": 0.25}
    out, _ = SampleMask(overlong=True, in_baseline=False)(batch)
    assert out["in_baseline"].tolist() == [True, False, True, True]
    assert SampleMask(positives=True)(batch)[0]["in_loss"].tolist() == [True, False, True, False]


def test_off_policy_mask_drops_bad_sequences_that_were_left() -> None:
    columns = {"logp_old": [[-1.0, -1.0]] * 3, "advantage": [[-1.0] * 2, [1.0] * 2, [-1.0] * 2]}
    batch = ragged([[1, 1]] * 3, columns)
    now = Forward(logp=f64([-1.2, -2.0, -9, -9, -1.1, -1.8]))  # gaps .6, 8 (but A > 0), .45
    assert OffPolicyMask(0.5)(batch, batch["action"], now).tolist() == [False, False, True, True, True, True]


# Single-stream
def test_single_stream_tracks_problems() -> None:
    tracker = Tracker(min_keep=0.5, max_keep=0.8, half_life=0.1)
    columns = {"logp_rollout": [[-1.0, -3.0], [-2.0, 55.0]]}
    batch = ragged([[1, 1], [1, 0]], columns, score=[1.0, -1.0], accuracy=[1.0, 0.0], problem=[7, 8])
    out, state = tracker.estimate(batch, ObjectiveState())
    close(out["advantage"], [2**-0.5, 2**-0.5, -(2**-0.5), 0], 1e-5)  # new problems: baseline is the batch mean 0
    assert state.extra["problems"]["7"] == pytest.approx([0.8 * 2 + 1, 1 / 2.6, 0.5 + 0.5 / 2.6, -2.0])
    again = ragged([[1, 1]], {"logp_rollout": [[-2.05, -2.05]]}, score=[1.0], accuracy=[1.0], problem=[7])
    _, later = tracker.estimate(again, state)
    n = 2.6 * 2**-0.5 + 1  # drift .05 = half of the half-life
    assert later.extra["problems"]["7"][0] == pytest.approx(n)
    assert later.extra["problems"]["7"][1] == pytest.approx(1 / 2.6 + (1 - 1 / 2.6) / n)
    assert later.extra["problems"]["8"] == state.extra["problems"]["8"]
    assert ObjectiveState.from_json(later.to_json()) == later
    p = state.extra["problems"]["7"][2]
    assert priorities(state)["7"] == pytest.approx(math.sqrt(p * (1 - p)) + 0.05)
    assert priorities(ObjectiveState()) == {}
