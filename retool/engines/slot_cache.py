"""Key/value store of the embedded engine: one slot a trajectory, every slot with its own length.

A `transformers` cache normally has one clock for the whole batch. Here a forward pass says which slots it runs over
and at which columns each of their tokens stands (`select`), so rows of any age share a pass and a row that waits for
its tool holds nobody. What lies at or behind a row's length is never visible (the mask compares columns with
positions) and is overwritten before it could be.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

STEP = 64  # columns are allocated in these steps


class SlotCache(Cache):
    """Keys and values per layer as `[slots, kv_heads, capacity, head_dim]`, allocated when first written to."""

    def __init__(self, slots: int) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.slots = slots
        self.capacity = 0
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._rows: torch.Tensor | None = None
        self._index = torch.empty(0, dtype=torch.long)
        self._positions = torch.empty(0, dtype=torch.long)
        self._count = 0
        self._used = 0

    def release(self, slots: int | None = None) -> None:
        """Forget everything and give the memory back; optionally change the number of slots."""
        self._keys, self._values, self.capacity = [], [], 0
        self.slots = self.slots if slots is None else slots

    def reserve(self, columns: int) -> None:
        """Make room for `columns` tokens a slot; what is stored stays."""
        if columns <= self.capacity:
            return
        self.capacity = max(-(-columns // STEP) * STEP, min(self.capacity + self.capacity // 2, self.capacity + 1024))
        for store in (self._keys, self._values):
            for layer, old in enumerate(store):
                new = old.new_zeros(self.slots, old.shape[1], self.capacity, old.shape[3])
                new[:, :, : old.shape[2]] = old
                store[layer] = new

    def select(self, rows: torch.Tensor | None, count: int, positions: torch.Tensor, used: int) -> None:
        """Say what the next forward pass runs over.

        `rows`: [n] slot numbers, or None for the first `count` slots without a copy. `positions`: [n, tokens] column
        of every token. `used`: attention sees columns below it.
        """
        self._rows, self._count, self._positions, self._used = rows, count, positions, used
        self._index = torch.arange(count, device=positions.device) if rows is None else rows

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store `[n, kv_heads, tokens, head_dim]` at the selected columns; gives back the used part of those rows."""
        while len(self._keys) <= layer_idx:
            for store, states in ((self._keys, key_states), (self._values, value_states)):
                store.append(states.new_zeros(self.slots, states.shape[1], self.capacity, states.shape[3]))
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        index = self._index[:, None]
        keys[index, :, self._positions] = key_states.transpose(1, 2)
        values[index, :, self._positions] = value_states.transpose(1, 2)
        if self._rows is None:
            return keys[: self._count, :, : self._used], values[: self._count, :, : self._used]
        return (
            keys[:, :, : self._used].index_select(0, self._rows),
            values[:, :, : self._used].index_select(0, self._rows),
        )

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Duplicate the first `length` columns of a slot."""
        for store in (self._keys, self._values):
            for tensor in store:
                tensor[target, :, :length] = tensor[source, :, :length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Never asked for with explicit positions; rows have no common length."""
        return self._used
