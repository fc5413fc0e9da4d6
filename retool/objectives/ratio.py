"""Importance ratios between the current policy and the one that an update started from."""

from __future__ import annotations

import torch
from torch import Tensor

from retool.objectives.batch import Batch

LOG_CLAMP = 20.0


def token_ratio(logp: Tensor, logp_old: Tensor, mask: Tensor) -> Tensor:
    """[N] exp(clamp(logp - logp_old, ±20)); 1 where the mask is off, whatever stands there (A §0.5)."""
    difference = torch.where(mask, logp - logp_old, torch.zeros_like(logp))
    return torch.exp(difference.clamp(-LOG_CLAMP, LOG_CLAMP))


def sequence_ratio(logp: Tensor, logp_old: Tensor, mask: Tensor, batch: Batch) -> Tensor:
    """[N] exp(mean over the sample's action tokens of logp - logp_old), repeated for its tokens (GSPO, 2507.18071).

    The mean is over action tokens only. With `seq_mean_token_mean` the gradient is the paper's.
    """
    difference = torch.where(mask, logp - logp_old, torch.zeros_like(logp))
    mean = batch.sum(difference) / batch.sum(mask.to(logp.dtype)).clamp(min=1)
    return torch.exp(mean.clamp(-LOG_CLAMP, LOG_CLAMP))[batch.row]
