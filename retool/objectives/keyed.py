"""Random numbers keyed by (seed, trajectory, token index), so that no order, packing or rank can change a choice."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from retool.objectives.batch import Batch


def key_of(*parts: object) -> int:
    """A signed 64-bit key of some names and numbers; equal on every machine."""
    text = "\x1f".join(str(p) for p in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64 with wrap-around; shifts are made logical by masking."""
    x = (x ^ ((x >> 30) & 0x3_FFFF_FFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1F_FFFF_FFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1_FFFF_FFFF)


def token_uniform(batch: Batch, seed: int) -> Tensor:
    """[N] float64 in [0, 1): one draw a token, from `seed`, the sample column `key` and how many action tokens of the
    sample come before it: a longer tool output moves nothing."""
    x = batch["key"][batch.row] ^ key_of("token", seed)
    acted = batch["action"].to(torch.int64)
    before = torch.cumsum(acted, 0) - acted
    starts = torch.cat([before, before.new_zeros(1)])[batch.offsets[:-1]]
    x = _mix(_mix(x) + (before - starts[batch.row]) * -7046029254386353131)
    return ((x >> 11) & 0x1F_FFFF_FFFF_FFFF).to(torch.float64) / 2.0**53


def sample_uniform(batch: Batch, seed: int) -> Tensor:
    """[B] float64 in [0, 1): one draw a sample, from `seed` and the sample column `key`."""
    x = _mix(_mix(batch["key"] ^ key_of("sample", seed)))
    return ((x >> 11) & 0x1F_FFFF_FFFF_FFFF).to(torch.float64) / 2.0**53


def problem_key(problem: str) -> int:
    """The key under which the sample column `problem` and the problem statistics of a state know a problem."""
    return key_of("problem", problem)
