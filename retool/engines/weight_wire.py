"""Weights as they travel from the learner to the workers of a vLLM server: what both ends must agree on.

Whole tensors are packed into buckets, flat buffers of bytes; their names, types and shapes go beside them as JSON in
vLLM's update requests. Nothing is pickled. How a bucket gets across: weight_group.py, or a CUDA IPC handle here.

Runs in the learner's and in vLLM's interpreter and imports torch only.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BUCKET = 256 << 20  # bytes
_ALIGN = 64  # bytes; a tensor of any type may begin there
_HANDLE = (int, bytes, int, int, bytes, int, bytes, bool)  # what torch's `_share_cuda_` gives


class WireError(RuntimeError):
    """The other end is gone, late, or says what cannot be."""


class WireRefused(WireError):
    """The other end is there and may not take part."""


# -- buckets -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A tensor's name, type (`bfloat16`) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Entry:
        return cls(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    @classmethod
    def read(cls, told: Any) -> Entry:
        """From JSON: [name, type, shape]. Raises `WireError` for anything else."""
        try:
            name, dtype, shape = told
            made = cls(name, dtype, tuple(shape))
            if isinstance(name, str) and all(type(n) is int and n >= 0 for n in made.shape) and made.bytes >= 0:
                return made
        except (TypeError, ValueError, AttributeError):
            pass
        raise WireError(f"not a tensor's name, type and shape: {str(told)[:200]}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """Raises `AttributeError` for no type of torch."""
        found = getattr(torch, self.dtype)
        if not isinstance(found, torch.dtype):
            raise AttributeError(self.dtype)
        return found

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize


def layout(entries: Sequence[Entry]) -> tuple[list[int], int]:
    """Where each tensor begins in its bucket, and the bucket's bytes."""
    starts, end = [], 0
    for entry in entries:
        starts.append(end)
        end += -(-entry.bytes // _ALIGN) * _ALIGN
    return starts, end


def buckets(entries: Sequence[Entry], limit: int = BUCKET) -> Iterator[list[int]]:
    """Indices of entries, in order, that travel together; a tensor larger than `limit` travels alone."""
    found: list[int] = []
    size = 0
    for i, entry in enumerate(entries):
        _, more = layout([entry])
        if found and size + more > limit:
            yield found
            found, size = [], 0
        found.append(i)
        size += more
    if found:
        yield found


def pack(entries: Sequence[Entry], tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """A bucket, uint8 [bytes]. Raises `WireError` where a tensor is not what its entry says."""
    starts, size = layout(entries)
    buffer = torch.empty(size, dtype=torch.uint8, device=device)
    for entry, tensor, place in zip(entries, tensors, _views(buffer, entries, starts), strict=True):
        if Entry.of(entry.name, tensor) != entry:
            raise WireError(f"{entry} is now {Entry.of(entry.name, tensor)}")
        place.copy_(tensor.detach())
    return buffer


def unpack(buffer: Tensor, entries: Sequence[Entry]) -> list[tuple[str, Tensor]]:
    """The tensors of a bucket: views of `buffer`. Raises `WireError` where it is not as long as they say."""
    starts, size = layout(entries)
    if buffer.dtype != torch.uint8 or tuple(buffer.shape) != (size,):
        raise WireError(f"a bucket of {tuple(buffer.shape)} bytes for tensors of {size}")
    return [(e.name, view) for e, view in zip(entries, _views(buffer, entries, starts), strict=True)]


def _views(buffer: Tensor, entries: Sequence[Entry], starts: Sequence[int]) -> Iterator[Tensor]:
    for entry, start in zip(entries, starts, strict=True):
        yield buffer[start : start + entry.bytes].view(entry.torch_dtype).view(entry.shape)


def export_bucket(buffer: Tensor) -> list[Any]:
    """The CUDA IPC handle of a bucket, as JSON; `buffer` must be kept until the other end has taken it."""
    torch.cuda.synchronize(buffer.device)
    with wire_errors():
        return encode_handle(buffer.untyped_storage()._share_cuda_())


def import_bucket(told: Any, device: torch.device) -> Tensor:
    """A copy of the bucket that `export_bucket` names, on the same GPU. Raises `WireError`."""
    _, *handle = decode_handle(told)  # whatever the learner counts its GPU as
    torch.cuda.init()
    with wire_errors():
        storage = torch.UntypedStorage._new_shared_cuda(device.index or 0, *handle)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage).clone()


def encode_handle(handle: Sequence[Any]) -> list[Any]:
    """Bytes as base64, everything else as it is."""
    return [{"base64": base64.b64encode(x).decode()} if isinstance(x, bytes) else x for x in handle]


def decode_handle(told: Any) -> tuple[Any, ...]:
    """Raises `WireError` for anything that `encode_handle` did not make of a CUDA IPC handle."""
    try:
        found = tuple(base64.b64decode(x["base64"], validate=True) if isinstance(x, dict) else x for x in told)
        if tuple(map(type, found)) == _HANDLE:
            return found
    except (TypeError, ValueError, KeyError):
        pass
    raise WireError("no CUDA IPC handle")


@contextmanager
def wire_errors() -> Iterator[None]:
    """torch's errors as `WireError`, without its stack of frames."""
    try:
        yield
    except WireError:
        raise
    except RuntimeError as error:
        raise WireError(first_line(error)) from error


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
