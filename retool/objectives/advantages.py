"""Advantages as pure functions: GAE that skips masked tokens, group statistics, whitening (A §2.1, §4.1, A.2)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from retool.objectives.batch import Batch, pad, unpad

Std = Literal["population", "sample", "none"]
GroupKind = Literal["zscore", "mean", "rloo", "std"]
SAME = 1e-9
"""Scores closer than this are equal: 0.1 + 0.2 and 0.3 must not make a group with variance."""


def last_action(batch: Batch) -> Tensor:
    """[B] flat index of each sample's last action token, -1 for a sample that has none."""
    action = batch["action"]
    out = torch.full((len(batch),), -1, dtype=torch.int64, device=action.device)
    where = torch.nonzero(action)[:, 0]
    return out.scatter_reduce(0, batch.row[where], where, "amax")


def token_rewards(batch: Batch) -> Tensor:
    """[N] the score on the last action token of each sample, plus the columns `kl_reward` and `turn_reward` (on each
    turn's last action token) where there are such."""
    rewards = torch.zeros(batch.n_tokens, dtype=batch["score"].dtype)
    last = last_action(batch)
    rewards[last[last >= 0]] = batch["score"][last >= 0]
    for name in ("kl_reward", "turn_reward"):
        if (extra := batch.get(name)) is not None:
            rewards = rewards + extra
    return rewards


def gae(
    rewards: Tensor, values: Tensor, action: Tensor, batch: Batch, gamma: float, lam: Tensor, boot: Tensor | None = None
) -> Tensor:
    """[N] generalised advantage estimates (1506.02438), 0 where `action` is off.

    `lam` is [B]: each sample has its own. Masked tokens are skipped: no δ, no decay; the value and the running
    estimate of the next action token are carried across them. `boot` [B]: value of the state after the last token.
    """
    index = torch.nonzero(action)[:, 0]
    counts = batch.sum(action.to(torch.int64))
    zero = torch.zeros(1, dtype=torch.int64, device=index.device)
    offsets = torch.cat([zero, torch.cumsum(counts, 0)])
    r, v = pad(rewards[index], offsets), pad(values[index], offsets)
    valid = torch.arange(r.shape[1], device=index.device) < counts[:, None]
    next_value = torch.zeros_like(lam) if boot is None else boot
    running = torch.zeros_like(next_value)
    out = torch.zeros_like(r)
    for t in range(r.shape[1] - 1, -1, -1):
        estimate = r[:, t] + gamma * next_value - v[:, t] + gamma * lam * running
        running = torch.where(valid[:, t], estimate, running)
        next_value = torch.where(valid[:, t], v[:, t], next_value)
        out[:, t] = estimate
    result = torch.zeros_like(rewards)
    result[index] = unpad(out, offsets)
    return result


def adaptive_lambda(action_counts: Tensor, alpha: float, low: float, high: float) -> Tensor:
    """[B] λ = 1 - 1 / (α l), l = action tokens of the sample, clamped to [low, high] (VAPO, 2504.05118)."""
    return (1 - 1 / (alpha * action_counts.clamp(min=1))).clamp(low, high)


def group_advantage(
    score: Tensor, group: Tensor, counted: Tensor, kind: GroupKind, std: Std = "sample", eps: float = 1e-6
) -> Tensor:
    """[B] scores relative to their group (GRPO 2402.03300, Dr. GRPO 2503.20783, RLOO 2402.14740).

    `counted` [B] bool: who enters mean and standard deviation. zscore: (r - mean) / (std + eps); mean: r - mean;
    rloo: G/(G-1) (r - mean), the leave-one-out baseline; std: r / (std + eps) (2504.11343). A group whose counted
    scores are all equal, or that has fewer than two of them, has nothing to compare: advantage 0.
    """
    _, g = torch.unique(group, return_inverse=True)
    n_groups = int(g.max()) + 1 if len(g) else 0
    c = counted.to(score.dtype)
    zeros = torch.zeros(n_groups, dtype=score.dtype, device=score.device)
    n = zeros.index_add(0, g, c)
    mean = zeros.index_add(0, g, torch.where(counted, score, 0.0)) / n.clamp(min=1)
    centred = torch.where(torch.isfinite(score), score, 0.0) - mean[g]
    var = zeros.index_add(0, g, c * centred.square())
    if std == "sample":
        var = var / (n - 1).clamp(min=1)
    else:
        var = var / n.clamp(min=1)
    high = torch.full_like(zeros, -torch.inf).scatter_reduce(0, g[counted], score[counted], "amax")
    low = torch.full_like(zeros, torch.inf).scatter_reduce(0, g[counted], score[counted], "amin")
    differs = (n >= 2) & (high - low > SAME)
    if kind == "zscore" and std != "none":
        centred = centred / (var.sqrt() + eps)[g]
    elif kind == "std":
        centred = torch.where(torch.isfinite(score), score, 0.0) / (var.sqrt() + eps)[g]
    elif kind == "rloo":
        centred = centred * (n / (n - 1).clamp(min=1))[g]
    return torch.where(differs[g], centred, torch.zeros_like(centred))


def whiten(values: Tensor, mask: Tensor, unbiased: bool = True, eps: float = 1e-8) -> Tensor:
    """[N] (x - mean) / sqrt(var + eps) over the masked tokens, 0 elsewhere. Fewer than two tokens stay as they are."""
    inside = values[mask]
    if len(inside) < 2:
        return values
    var, mean = torch.var_mean(inside, correction=int(unbiased))
    return torch.where(mask, (values - mean) / torch.sqrt(var + eps), torch.zeros_like(values))


def reward_to_go(rewards: Tensor, action: Tensor, batch: Batch) -> Tensor:
    """[N] sum of the rewards from each action token to the end of its sample (γ = 1); masked tokens are skipped."""
    return discounted_returns(rewards, action, batch, 1.0)


def discounted_returns(rewards: Tensor, action: Tensor, batch: Batch, gamma: float) -> Tensor:
    """[N] Σ γ^k r over the action tokens from each one to the end of its sample; masked tokens are skipped: they give
    no reward, cost no discount and do not reset the sum (a trajectory would lose all credit before its last tool call).
    """
    ones = torch.ones(len(batch), dtype=rewards.dtype, device=rewards.device)
    return gae(rewards, torch.zeros_like(rewards), action, batch, gamma, ones)


def turn_segments(batch: Batch) -> tuple[Tensor, Tensor]:
    """([N] index of the turn that an action token belongs to, -1 elsewhere; [S] row of each turn), turns of one sample
    in order and samples one after the other."""
    action, turn = batch["action"], batch["turn"]
    wide = int(turn.max()) + 1 if len(turn) else 1
    found, index = torch.unique((batch.row * wide + turn)[action], return_inverse=True)
    out = torch.full_like(turn, -1)
    out[action] = index
    return out, torch.div(found, wide, rounding_mode="floor")


def turn_returns(batch: Batch, gamma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Discounted returns of turns, G_k = Σ_j γ^(j-k) r_j (GTPO, 2511.14846): ([S] returns, [S] row of each turn,
    [N] turn of each token). r_k is the turn's own `turn_reward` where there is that column, the last turn's also the
    score; a KL in the reward is added."""
    segment, row = turn_segments(batch)
    action = batch["action"]
    rewards = token_rewards(batch)
    r = torch.zeros(len(row), dtype=rewards.dtype, device=rewards.device).index_add(0, segment[action], rewards[action])
    counts = torch.bincount(row, minlength=len(batch))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64, device=row.device), torch.cumsum(counts, 0)])
    turns = Batch(offsets, {"r": r}, {})
    return discounted_returns(r, torch.ones_like(row, dtype=torch.bool), turns, gamma), row, segment
