"""The gap between the engine that sampled and the learner that trains: weights and rejections (A §0.4, §12).

ρ = exp(logp_old - logp_rollout), never differentiated. Names in the literature: `weight: token` with a cap is TIS;
`weight: token, reject: token` is MIS / IcePop; `reject: geo` is Geo-RS.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retool.objectives.base import OffPolicy
from retool.objectives.batch import Batch

LOG_CLAMP = 20.0


def importance(batch: Batch, options: OffPolicy) -> tuple[Tensor, Tensor]:
    """([N] weights, [N] bool kept) from the columns `logp_old`, `logp_rollout`, `action`.

    A product over a sequence has a length trap: 1.01^1000 = 20959. Prefer `token` or `geo`.
    """
    action = batch["action"]
    gap = torch.where(action, batch["logp_old"] - batch["logp_rollout"], torch.zeros_like(batch["logp_old"]))
    token = torch.exp(gap.clamp(-LOG_CLAMP, LOG_CLAMP))
    total = batch.sum(gap)
    sequence = torch.exp(total.clamp(-LOG_CLAMP, LOG_CLAMP))[batch.row]
    geo = torch.exp(total / batch.sum(action.to(gap.dtype)).clamp(min=1))[batch.row]
    weight = {"none": torch.ones_like(token), "token": token, "sequence": sequence}[options.weight]
    if options.weight != "none" and options.cap is not None:
        weight = weight.clamp(max=options.cap)
    kept = action
    if options.reject != "none":
        ratio = {"token": token, "sequence": sequence, "geo": geo}[options.reject]
        kept = action & (ratio >= options.low) & (ratio <= options.high)
    if options.normalise and bool(kept.any()):
        weight = weight / weight[kept].mean()
    return weight.detach(), kept
