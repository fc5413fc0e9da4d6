"""Policy-gradient surrogates: PPO's clip (1707.06347) with DAPO's asymmetry and the dual clip (1912.09729), CISPO's
weighted log-probs (2506.13585), SAPO's soft gate (2511.20347)."""

from __future__ import annotations

import torch
from torch import Tensor


def clip_surrogate(
    ratio: Tensor, advantage: Tensor, clip_low: float | None, clip_high: float | None, dual_clip: float | None = None
) -> Tensor:
    """[N] max(-A r, -A clip(r, 1-ε_lo, 1+ε_hi)); where A < 0 and `dual_clip` c is set, at most -c A.

    A clip of None leaves that side open; both None is the plain importance-weighted policy gradient.
    """
    plain = -advantage * ratio
    if clip_low is None and clip_high is None:
        loss = plain
    else:
        low = None if clip_low is None else 1 - clip_low
        high = None if clip_high is None else 1 + clip_high
        loss = torch.maximum(plain, -advantage * ratio.clamp(low, high))
    if dual_clip is None:
        return loss
    return torch.where(advantage < 0, torch.minimum(loss, -dual_clip * advantage), loss)


def cispo_surrogate(logp: Tensor, ratio: Tensor, advantage: Tensor, low: float | None, high: float | None) -> Tensor:
    """[N] -sg[clamp(r, low, high)] A log π: every token keeps a gradient, its weight is bounded (absolute)."""
    weight = ratio.detach()
    if low is not None or high is not None:
        weight = weight.clamp(low, high)
    return -weight * advantage * logp


def sapo_surrogate(ratio: Tensor, advantage: Tensor, tau_pos: float, tau_neg: float) -> Tensor:
    """[N] -A (4/τ) σ(τ (r - 1)), τ by the sign of the advantage. Its slope in r at r = 1 is -A, as without a gate."""
    tau = torch.where(advantage > 0, tau_pos, tau_neg).to(ratio.dtype)
    return -advantage * 4 / tau * torch.sigmoid(tau * (ratio - 1))


def clip_fractions(
    ratio: Tensor, advantage: Tensor, clip_low: float | None, clip_high: float | None, tolerance: float = 1e-9
) -> tuple[Tensor, Tensor]:
    """([N] bool, [N] bool): clipped from above (A > 0) and from below (A < 0). A ratio on the edge is not clipped."""
    none = torch.zeros_like(ratio, dtype=torch.bool)
    high = none if clip_high is None else (ratio > 1 + clip_high + tolerance) & (advantage > 0)
    low = none if clip_low is None else (ratio < 1 - clip_low - tolerance) & (advantage < 0)
    return low, high
