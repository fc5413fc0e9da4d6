"""Small ragged batches for the tests of objectives, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retool.objectives import Batch

F64 = torch.float64


def f64(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=F64)


def ragged(
    mask: Sequence[Sequence[int]],
    tokens: dict[str, Sequence[Sequence[float]]] | None = None,
    **samples: Sequence[object],
) -> Batch:
    """Rows of action masks, token columns in the same shape, sample columns; sensible defaults for the rest."""
    lengths = [len(row) for row in mask]
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    columns = {"action": torch.tensor([bool(x) for row in mask for x in row], dtype=torch.bool)}
    for name, rows in (tokens or {}).items():
        columns[name] = f64([x for row in rows for x in row])
        assert len(columns[name]) == offsets[-1], name
    n = len(mask)
    defaults: dict[str, Sequence[object]] = {
        "score": [0.0] * n,
        "accuracy": [0.0] * n,
        "group": list(range(n)),
        "pair": [-1] * n,
        "key": [i * 7919 + 13 for i in range(n)],
        "in_loss": [True] * n,
        "in_baseline": [True] * n,
    }
    made = {}
    for name, values in (defaults | samples).items():
        tensor = torch.tensor(values)
        made[name] = tensor.to(F64) if name in ("score", "accuracy", "bootstrap") else tensor
    return Batch(offsets, columns, made)
