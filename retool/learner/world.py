"""The ranks of one learner. One process is a world of size 1; under `torchrun` the same code runs on N.

Every rank holds the columns of the whole rollout (they are small) and computes forward passes for its share of the
micro-batches. Gradients are *summed* over ranks: every numerator was already divided by the global denominator.
Networks are whole on every rank (all-reduced gradients), or sharded with FSDP2: see `retool/learner/shard.py`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET = 1 << 24
"""Elements that travel in one all-reduce."""


@dataclass(frozen=True)
class World:
    """`rank` of `size` processes; with size > 1 the default process group must be initialised."""

    rank: int = 0
    size: int = 1

    @classmethod
    def from_env(cls) -> World:
        """The world that `torchrun` describes: joins it with NCCL on GPUs, gloo otherwise. One process without it."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if not dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its sum over ranks, in flat buckets of one dtype; ranks must pass equal shapes."""
        if self.size == 1:
            return
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            bucket: list[Tensor] = []
            for tensor in (t for t in tensors if t.dtype == dtype):
                bucket.append(tensor)
                if sum(t.numel() for t in bucket) >= BUCKET:
                    self._reduce(bucket)
                    bucket = []
            if bucket:
                self._reduce(bucket)

    @staticmethod
    def _reduce(bucket: list[Tensor]) -> None:
        flat = torch.cat([t.reshape(-1) for t in bucket])
        dist.all_reduce(flat)
        for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket])):
            tensor.copy_(part.view_as(tensor))

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            dist.barrier()
