"""Worlds small enough to solve by hand: a three-action bandit, and a chain whose values and advantages are known."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from retool.config import Recipe
from retool.objectives import Batch, Forward, Objective, build_objective, preset_fragment
from retool.objectives.estimators import Gae, LengthAdaptive
from tests.objectives.build_batches import F64, f64, ragged

OPTIMUM = f64([0.576117, 0.211942, 0.211942])  # softmax of the reward (1, 0, 0): reference uniform, β = 1


def ppo(**changes: Any) -> Objective:
    fragment = preset_fragment("ppo_rlhf")
    fragment["objective"]["kl"]["beta"] = 1.0
    for section, values in changes.items():
        fragment["objective"][section] = {**fragment["objective"].get(section, {}), **values}
    return build_objective(Recipe(**fragment))


def learn(objective: Objective, rollouts: int, size: int) -> torch.Tensor:
    """The loop of the learner on a softmax policy and a constant critic: score, prepare, four updates a rollout."""
    logits, value = torch.zeros(3, dtype=F64, requires_grad=True), torch.zeros(1, dtype=F64, requires_grad=True)
    state, generator = objective.initial_state(), torch.Generator().manual_seed(0)
    for rollout in range(rollouts):
        with torch.no_grad():
            logp = logits.log_softmax(-1)
            # systematic sampling: unbiased, with far less noise than independent draws
            points = (torch.arange(size, dtype=F64) + torch.rand(1, generator=generator, dtype=F64)) / size
            action = torch.bucketize(points, logp.exp().cumsum(-1)).clamp(max=2)
            reference = torch.full((size,), -torch.tensor(3.0, dtype=F64).log().item(), dtype=F64)
        batch = ragged([[1]] * size, score=(action == 0).double().tolist())
        batch = batch.with_tokens(logp_old=logp[action], logp_ref=reference, value=value.detach().expand(size))
        batch, state, _ = objective.prepare(batch, state)
        lr = 0.3 / (1 + 0.05 * rollout)
        for part in torch.randperm(size, generator=generator).chunk(4):
            final = objective.finalize(batch.take(part), state)
            forward = Forward(logp=logits.log_softmax(-1)[action[part]], value=value.expand(len(part)))
            losses = objective.loss(final.batch, forward)
            sum(final.scale(name) * numerator for name, numerator in losses.items()).backward()
            with torch.no_grad():
                for p in (logits, value):
                    p -= lr * p.grad
                    p.grad = None
    return logits.detach().softmax(-1)


def test_bandit_reaches_the_analytic_optimum() -> None:
    """A §3.5: with KL in the reward and β = 1 the best policy is (.576117, .211942, .211942)."""
    torch.testing.assert_close(learn(ppo(advantage={"whiten": False}), 300, 600), OPTIMUM, rtol=0, atol=2e-3)


def test_bandit_with_whitening() -> None:
    """Whitening blows up what is left of the advantages near the optimum, so it is reached less sharply."""
    torch.testing.assert_close(learn(ppo(), 300, 600), OPTIMUM, rtol=0, atol=2e-2)


def test_bandit_without_the_leash_forgets_the_reference() -> None:
    """The control: what stops at the optimum is the KL."""
    free = learn(ppo(kl={"beta": 0.0}, advantage={"whiten": False}), 300, 600)
    assert float(free[0]) > 0.9


# A chain of STEPS coin tosses; a right turn (1) has probability P; reward 1 when at least NEED of them were right.
STEPS, NEED, P = 5, 3, 0.6


def chance(right: int, done: int) -> float:
    """V of the state after `done` tosses of which `right` were right."""
    rest = STEPS - done
    return sum(
        P ** sum(tail) * (1 - P) ** (rest - sum(tail))
        for tail in itertools.product((0, 1), repeat=rest)
        if right + sum(tail) >= NEED
    )


def chain(exact: bool = True) -> tuple[Batch, torch.Tensor, torch.Tensor]:
    """(every path as a row, with a tool token in the middle; its probability [B]; its true advantages [N])."""
    paths = list(itertools.product((0, 1), repeat=STEPS))
    masks, values, truth, scores, weights = [], [], [], [], []
    for path in paths:
        states = [chance(sum(path[:t]), t) for t in range(STEPS + 1)]
        told = states[:-1] if exact else [0.3] * STEPS
        gaps = [states[t + 1] - states[t] for t in range(STEPS)]
        masks.append([1, 1, 0, 1, 1, 1])
        values.append([*told[:2], 99.0, *told[2:]])
        truth += [*gaps[:2], 0.0, *gaps[2:]]
        scores.append(float(sum(path) >= NEED))
        weights.append(P ** sum(path) * (1 - P) ** (STEPS - sum(path)))
    batch = ragged(masks, {"critic_value": values}, score=scores)
    return batch, f64(weights), f64(truth)


def expected(batch: Batch, probability: torch.Tensor, advantage: torch.Tensor) -> dict[tuple[int, ...], torch.Tensor]:
    """Mean advantage of the last toss of every prefix, over all ways to go on."""
    paths = list(itertools.product((0, 1), repeat=STEPS))
    out = {}
    for length in range(1, STEPS + 1):
        where = length - 1 if length <= 2 else length  # behind the tool token
        for prefix in itertools.product((0, 1), repeat=length):
            rows = [i for i, path in enumerate(paths) if path[:length] == prefix]
            weight = probability[rows] / probability[rows].sum()
            out[prefix] = (weight * advantage.view(len(paths), -1)[rows, where]).sum()
    return out


LAMBDAS = [1.0, 0.95, 0.5, LengthAdaptive(0.5), LengthAdaptive(0.05)]


@pytest.mark.parametrize("lam", LAMBDAS)
def test_chain_advantages_are_true_where_values_are_exact(lam: Any) -> None:
    """With V exact every λ gives the true advantage of each toss, on average over what follows."""
    batch, probability, truth = chain()
    out = Gae(lam=lam, lam_value=1.0, whiten=False)(batch)
    told, known = expected(batch, probability, out["advantage"]), expected(batch, probability, truth)
    for prefix, value in known.items():
        torch.testing.assert_close(told[prefix], value, rtol=0, atol=1e-12, msg=f"{prefix}")


def test_chain_values_are_the_mean_of_monte_carlo_targets() -> None:
    """λ_V = 1: targets are the outcome itself whatever the critic says; their mean is the true value."""
    for exact in (True, False):
        batch, probability, _ = chain(exact)
        out = Gae(lam=0.5, lam_value=1.0, whiten=False)(batch)
        target = out["return"].view(2**STEPS, -1)
        torch.testing.assert_close(target[:, 0], batch["score"])
        torch.testing.assert_close((probability * target[:, 0]).sum(), torch.tensor(chance(0, 0), dtype=F64))


def test_chain_decoupled_lambda() -> None:
    """The policy's λ leaves the critic's target alone, and the critic's λ leaves the policy's advantage alone."""
    batch, _, _ = chain(exact=False)

    def columns(lam: Any, lam_value: float) -> tuple[torch.Tensor, torch.Tensor]:
        out = Gae(lam=lam, lam_value=lam_value, whiten=False)(batch)
        return out["advantage"], out["return"]

    first = columns(0.95, 1.0)
    for lam in LAMBDAS:
        assert torch.equal(columns(lam, 1.0)[1], first[1])
    assert torch.equal(columns(0.95, 0.5)[0], first[0])
    assert not torch.allclose(columns(0.95, 0.5)[1], first[1])


def test_chain_a_wrong_critic_biases_short_horizons_only() -> None:
    """The reason for value pretraining: with a wrong V, λ < 1 gives wrong advantages; λ = 1 is off by V alone."""
    batch, probability, truth = chain(exact=False)
    known = expected(batch, probability, truth)

    def contrast(told: dict[tuple[int, ...], torch.Tensor]) -> float:
        return float(told[(1,)] - told[(0,)])

    one, short = (expected(batch, probability, Gae(lam=lam, whiten=False)(batch)["advantage"]) for lam in (1.0, 0.5))
    assert contrast(one) == pytest.approx(contrast(known), abs=1e-12)
    assert contrast(short) < 0.2 * contrast(known)


def test_reward_clip_comes_before_the_kl() -> None:
    fragment = preset_fragment("ppo_rlhf")
    fragment["objective"] |= {"reward_clip": 2.0}
    fragment["objective"]["advantage"] = {**fragment["objective"]["advantage"], "whiten": False}
    fragment["objective"]["kl"]["beta"] = 10.0
    objective = build_objective(Recipe(**fragment))
    batch = ragged([[1], [1]], {"value": [[0.0], [0.0]]}, score=[30.0, -1.0])
    batch = batch.with_tokens(logp_old=f64([-1.0, -1.0]), logp_ref=f64([-1.5, -1.0]))
    out, _, _ = objective.prepare(batch, objective.initial_state())
    torch.testing.assert_close(out["advantage"], f64([2.0 - 5.0, -1.0]))
