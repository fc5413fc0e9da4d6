"""From token losses to one number: the five aggregations, as token weights and one denominator (A §0.3).

The denominator is computed once over the whole mini-batch (all micro-batches, all ranks). The loss is then
Σ weight · ℓ / denominator, which no split of the tokens can change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from retool.objectives.batch import Batch

Mode = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "group_token_mean", "const"]
Rule = Literal["kept", "all_act"]
"""Whether dropped tokens leave the denominator (`kept`) or stay in it (`all_act`)."""


@dataclass(frozen=True)
class Aggregation:
    """`const_length` (tokens) is the C of `const`, which needs one."""

    mode: Mode = "token_mean"
    const_length: int | None = None

    def __call__(self, batch: Batch, counted: Tensor, denominated: Tensor) -> tuple[Tensor, float]:
        """`counted` [N] bool: tokens in the numerator. `denominated` [N] bool: tokens in the denominator.

        Returns ([N] weights, denominator). An empty denominator is 0.0: the caller's term is then zero.
        - token_mean: Σℓ / N
        - seq_mean_token_mean: mean over sequences with tokens of their own means
        - seq_mean_token_sum: mean over those sequences of their sums
        - group_token_mean: mean over groups of each group's token mean (DAPO eq. 8)
        - const: Σℓ / (B · C), B = all samples of the mini-batch (Dr. GRPO)
        Raises `ValueError` for `const` without a length.
        """
        dtype = torch.get_default_dtype() if batch.get("score") is None else batch["score"].dtype
        weights = counted.to(dtype)
        tokens = denominated.to(dtype)
        if self.mode == "token_mean":
            return weights, float(tokens.sum())
        if self.mode == "const":
            if self.const_length is None:
                raise ValueError("aggregation `const` needs const_length: the longest response in tokens")
            return weights, float(len(batch) * self.const_length)
        per_sample = batch.sum(tokens)
        if self.mode == "group_token_mean":
            _, group = torch.unique(batch["group"], return_inverse=True)
            per_group = torch.zeros(int(group.max()) + 1 if len(group) else 0, dtype=dtype).to(per_sample.device)
            per_group = per_group.index_add(0, group, per_sample)
            return weights / per_group[group].clamp(min=1)[batch.row], float((per_group > 0).sum())
        sequences = float((per_sample > 0).sum())
        if self.mode == "seq_mean_token_sum":
            return weights, sequences
        return weights / per_sample.clamp(min=1)[batch.row], sequences
