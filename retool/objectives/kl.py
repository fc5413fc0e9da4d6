"""KL estimators from one sampled token, and the controller of their coefficient (A §0.6; Schulman, "Approximating KL
divergence"; Ziegler et al. 2019 for the controller)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3", "k3_st", "abs_k1"]
LOG_CLAMP = 20.0
K3_CLAMP = 10.0


def kl_estimate(logp: Tensor, logp_other: Tensor, estimator: Estimator) -> Tensor:
    """Elementwise estimate of KL(π ‖ other) at tokens sampled from π; d = logp - logp_other clamped to ±20.

    k1 = d; k2 = d²/2; k3 = e^-d + d - 1, at most 10; abs_k1 = |d|. `k3_st` has the value of k3 and the gradient of k2,
    which is the gradient of the reverse KL.
    """
    d = (logp - logp_other).clamp(-LOG_CLAMP, LOG_CLAMP)
    if estimator == "k1":
        return d
    if estimator == "abs_k1":
        return d.abs()
    k2 = d.square() / 2
    if estimator == "k2":
        return k2
    k3 = (torch.exp(-d) + d - 1).clamp(max=K3_CLAMP)
    return k3 if estimator == "k3" else k2 + (k3 - k2).detach()


def adapt_beta(beta: float, kl: float, n: int, target: float, horizon: float) -> float:
    """Next coefficient: β (1 + clip(KL/target - 1, ±0.2) · n / horizon), n = samples of the rollout.

    `kl` is the mean over samples of the sum over their action tokens, in nats.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return beta * (1.0 + error * n / horizon)
