"""The critic's side: clipped value loss, normalisation of returns, explained variance (A §2.1)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from retool.objectives.base import Critic, ObjectiveState


def value_loss(value: Tensor, value_old: Tensor, target: Tensor, clip: float | None) -> Tensor:
    """[N] ½ max((V-G)², (V_c-G)²), V_c = V_old + clip(V - V_old, ±clip); without a clip ½ (V-G)²."""
    plain = (value - target).square()
    if clip is None:
        return plain / 2
    clipped = value_old + (value - value_old).clamp(-clip, clip)
    return torch.maximum(plain, (clipped - target).square()) / 2


def explained_variance(returns: Tensor, values: Tensor) -> float:
    """1 - Var(G - V) / Var(G); 0 when the returns do not vary."""
    if len(returns) < 2:
        return 0.0
    total = returns.var(correction=0)
    if float(total) < 1e-12:
        return 0.0
    return float(1 - (returns - values).var(correction=0) / total)


def moments(state: ObjectiveState, critic: Critic) -> tuple[float, float]:
    """(mean, standard deviation) of returns so far; (0, 1) before the first."""
    if not critic.normalise or state.value_weight == 0.0:
        return 0.0, 1.0
    mean = state.value_mean / state.value_weight
    variance = state.value_square / state.value_weight - mean * mean
    return mean, math.sqrt(max(variance, critic.eps))


def update_moments(state: ObjectiveState, critic: Critic, returns: Tensor) -> ObjectiveState:
    """Moving moments after one more rollout: x ← decay · x + (1 - decay) · new, with the gathered weight beside it."""
    if not critic.normalise or len(returns) == 0:
        return state
    d = critic.decay
    return replace(
        state,
        value_mean=d * state.value_mean + (1 - d) * float(returns.mean()),
        value_square=d * state.value_square + (1 - d) * float(returns.square().mean()),
        value_weight=d * state.value_weight + (1 - d),
    )
