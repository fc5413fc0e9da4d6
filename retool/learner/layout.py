"""Input tensors of a micro-batch, padded or packed, and where each target token is found in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Layout = Literal["padded", "packed"]


@dataclass(frozen=True)
class Inputs:
    """`ids` [R, L]; `position_ids` [R, L] for packed rows, else None. Target token n of the micro-batch is
    `ids.view(-1)[source[n]]`, predicted from the hidden state at `source[n] - 1`. `last` [B]: flat position of each
    sample's last token."""

    ids: Tensor
    position_ids: Tensor | None
    source: Tensor
    last: Tensor

    @property
    def targets(self) -> Tensor:
        """[n] the ids that the loss sees, read from the tensor that the model reads."""
        return self.ids.view(-1)[self.source]

    def to(self, device: torch.device) -> Inputs:
        if self.ids.device == device:
            return self
        positions = None if self.position_ids is None else self.position_ids.to(device)
        return Inputs(self.ids.to(device), positions, self.source.to(device), self.last.to(device))


def lay_out(rows: Sequence[np.ndarray], starts: Sequence[int], layout: Layout, pad_id: int) -> Inputs:
    """`rows`: the ids of each sample up to its last target; `starts`: index of its first target (>= 1).

    Padding is on the right: with causal attention no real token ever sees it, so no mask is needed. Packed rows are
    told apart by their position ids, which start again at 0.
    """
    lengths = np.array([len(r) for r in rows], dtype=np.int64)
    if layout == "padded":
        width = int(lengths.max())
        table = np.full((len(rows), width), pad_id, dtype=np.int64)
        for i, row in enumerate(rows):
            table[i, : len(row)] = row
        first = np.arange(len(rows), dtype=np.int64) * width
        positions = None
    else:
        table = np.concatenate(rows)[None].astype(np.int64)
        first = np.cumsum(lengths) - lengths
        positions = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])[None])
    begin = np.asarray(starts, dtype=np.int64)
    counts = lengths - begin
    shift = np.repeat(first + begin - (np.cumsum(counts) - counts), counts)
    source = shift + np.arange(int(counts.sum()))
    last = torch.from_numpy(first + lengths - 1)
    return Inputs(torch.from_numpy(table), positions, torch.from_numpy(source), last)
