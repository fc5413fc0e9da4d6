"""The ragged batch that every objective computes on: flat columns for target tokens, one row a sample.

A token column is `[N]` (all target tokens of all samples, one after the other), a sample column `[B]`. Sample b owns
the tokens `offsets[b]:offsets[b + 1]`. Nothing here is padded, so nothing can depend on padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


class MissingColumn(KeyError):
    """An objective read a column that nobody computed."""

    def __init__(self, name: str, have: Sequence[str]) -> None:
        super().__init__(name)
        self.name = name
        self.have = tuple(have)

    def __str__(self) -> str:
        return (
            f"the batch has no column {self.name!r} (it has: {', '.join(sorted(self.have)) or 'none'}); "
            f"list it in the `reads` of the part that uses it, so that it is computed first"
        )


@dataclass(frozen=True)
class Batch:
    """Ragged rows. `offsets`: [B+1] int64, first 0. `tokens`: name -> [N]. `samples`: name -> [B].

    `batch["name"]` finds a column in either; names are unique over both. Raises `ValueError` on a column of the wrong
    length and `MissingColumn` on an unknown name.
    """

    offsets: Tensor
    tokens: Mapping[str, Tensor]
    samples: Mapping[str, Tensor]
    _row: list[Tensor] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.offsets.dim() != 1 or len(self.offsets) < 1 or int(self.offsets[0]) != 0:
            raise ValueError("offsets must be [B+1] and start with 0")
        for name, column in self.tokens.items():
            if column.shape[0] != self.n_tokens:
                raise ValueError(f"token column {name!r} has {column.shape[0]} rows, expected {self.n_tokens}")
        for name, column in self.samples.items():
            if column.shape[0] != len(self):
                raise ValueError(f"sample column {name!r} has {column.shape[0]} rows, expected {len(self)}")
        if both := set(self.tokens) & set(self.samples):
            raise ValueError(f"columns {sorted(both)} are both of tokens and of samples")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def n_tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def lengths(self) -> Tensor:
        """[B] target tokens of each sample, masked ones included."""
        return self.offsets[1:] - self.offsets[:-1]

    @property
    def row(self) -> Tensor:
        """[N] index of the sample that owns each token."""
        if not self._row:
            index = torch.arange(len(self), device=self.offsets.device)
            self._row.append(torch.repeat_interleave(index, self.lengths))
        return self._row[0]

    @property
    def position(self) -> Tensor:
        """[N] index of each token in its own sample."""
        return torch.arange(self.n_tokens, device=self.offsets.device) - self.offsets[:-1][self.row]

    def __contains__(self, name: str) -> bool:
        return name in self.tokens or name in self.samples

    def __getitem__(self, name: str) -> Tensor:
        if name in self.tokens:
            return self.tokens[name]
        if name in self.samples:
            return self.samples[name]
        raise MissingColumn(name, (*self.tokens, *self.samples))

    def get(self, name: str) -> Tensor | None:
        """The column, or None when there is none."""
        return self.tokens.get(name, self.samples.get(name))

    def spread(self, name_or_column: str | Tensor) -> Tensor:
        """[N] a sample column repeated for each of the sample's tokens."""
        column = self[name_or_column] if isinstance(name_or_column, str) else name_or_column
        return column[self.row]

    def sum(self, values: Tensor) -> Tensor:
        """[B] sums of a token column over each sample's tokens."""
        out = torch.zeros(len(self), dtype=values.dtype, device=values.device)
        return out.index_add(0, self.row, values)

    def with_tokens(self, **columns: Tensor) -> Batch:
        """A copy with token columns added or replaced."""
        return Batch(self.offsets, {**self.tokens, **columns}, self.samples, self._row)

    def with_samples(self, **columns: Tensor) -> Batch:
        """A copy with sample columns added or replaced."""
        return Batch(self.offsets, self.tokens, {**self.samples, **columns}, self._row)

    def token_index(self, rows: Tensor) -> Tensor:
        """[M] flat indices of the tokens of samples `rows`, in that order."""
        lengths = self.lengths[rows]
        ends = torch.cumsum(lengths, 0)
        shift = self.offsets[:-1][rows] - (ends - lengths)
        total = int(ends[-1]) if len(ends) else 0
        return torch.repeat_interleave(shift, lengths) + torch.arange(total, device=rows.device)

    def take(self, rows: Sequence[int] | Tensor) -> Batch:
        """The samples `rows` (in that order, repeats allowed) with all their columns."""
        picked = torch.as_tensor(rows, dtype=torch.int64, device=self.offsets.device)
        index = self.token_index(picked)
        zero = torch.zeros(1, dtype=torch.int64, device=self.offsets.device)
        offsets = torch.cat([zero, torch.cumsum(self.lengths[picked], 0)])
        return Batch(
            offsets,
            {name: column[index] for name, column in self.tokens.items()},
            {name: column[picked] for name, column in self.samples.items()},
        )

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        if self.offsets.device == device:
            return self
        return Batch(
            self.offsets.to(device),
            {name: column.to(device) for name, column in self.tokens.items()},
            {name: column.to(device) for name, column in self.samples.items()},
        )

    def padded(self, name: str, fill: float = 0.0) -> Tensor:
        """[B, T] one token column, short rows filled up at the right. For tests and for recursions over time."""
        return pad(self[name], self.offsets, fill)


def pad(values: Tensor, offsets: Tensor, fill: float = 0.0) -> Tensor:
    """[N] with [B+1] offsets -> [B, T], right-padded with `fill`."""
    lengths = offsets[1:] - offsets[:-1]
    width = int(lengths.max()) if len(lengths) else 0
    out = torch.full((len(lengths), width), fill, dtype=values.dtype, device=values.device)
    out[torch.arange(width, device=values.device) < lengths[:, None]] = values
    return out


def unpad(values: Tensor, offsets: Tensor) -> Tensor:
    """The inverse of `pad`: [B, T] -> [N]."""
    lengths = offsets[1:] - offsets[:-1]
    return values[torch.arange(values.shape[1], device=values.device) < lengths[:, None]]


@dataclass(frozen=True)
class Atom:
    """What packing never splits: the rows of one sample, or of both samples of a pair."""

    rows: tuple[int, ...]


@dataclass(frozen=True)
class Forward:
    """What the networks say about the target tokens of a batch, all [N]; positions that are not `action` hold 0.

    `logp`: log-probability of the token at the sampling temperature. `entropy`: of the distribution it came from.
    `value`: the critic's value of the state before the token. `after`: [B] its value after the last token of each
    sample. What was not asked for is None.
    """

    logp: Tensor | None = None
    entropy: Tensor | None = None
    value: Tensor | None = None
    after: Tensor | None = None

    def need(self, name: str) -> Tensor:
        """The tensor, or `MissingColumn` when it was not computed."""
        value: Tensor | None = getattr(self, name)
        if value is None:
            have = [n for n in ("logp", "entropy", "value", "after") if getattr(self, n) is not None]
            raise MissingColumn(name, have)
        return value
