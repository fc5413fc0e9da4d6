"""Importance ratios between the current policy and the one that an update started from."""

from __future__ import annotations

import torch
from torch import Tensor

from retool.objectives.batch import Batch

LOG_CLAMP = 20.0


def old_logp(batch: Batch, logp: Tensor) -> Tensor:
    """[N] the column `logp_old`, or the current log-probs without gradient when the old ones are `detached`."""
    old = batch.get("logp_old")
    return logp.detach() if old is None else old


def token_ratio(logp: Tensor, logp_old: Tensor, mask: Tensor) -> Tensor:
    """[N] exp(clamp(logp - logp_old, ±20)); 1 where the mask is off, whatever stands there (A §0.5)."""
    difference = torch.where(mask, logp - logp_old, torch.zeros_like(logp))
    return torch.exp(difference.clamp(-LOG_CLAMP, LOG_CLAMP))


def sequence_ratio(logp: Tensor, logp_old: Tensor, mask: Tensor, batch: Batch) -> Tensor:
    """[N] s = exp(mean over the sample's action tokens of logp - logp_old), repeated for its tokens (GSPO, 2507.18071).

    Each token carries its own gradient, sg[s] exp(logp - sg[logp]): summed over the sample it is the gradient of s
    times the sample's number of tokens, so `seq_mean_token_mean` gives the paper's, and a token that a selector leaves
    out gets none. The mean is over action tokens only.
    """
    difference = torch.where(mask, logp - logp_old, torch.zeros_like(logp))
    mean = batch.sum(difference) / batch.sum(mask.to(logp.dtype)).clamp(min=1)
    s = torch.exp(mean.clamp(-LOG_CLAMP, LOG_CLAMP))[batch.row].detach()
    return s * torch.exp(torch.where(mask, logp - logp.detach(), torch.zeros_like(logp)))
