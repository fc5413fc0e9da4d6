"""Buckets of weights: what goes in comes out, whatever its type and shape, and what cannot be is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retool.engines.weight_wire import (
    Entry,
    WireError,
    buckets,
    decode_handle,
    encode_handle,
    import_bucket,
    layout,
    pack,
    unpack,
)

CPU = torch.device("cpu")
TYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Any bits at all, also those of NaN."""
    count = torch.Size(shape).numel() * dtype.itemsize
    bits = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    if dtype == torch.bool:
        bits = bits % 2
    return bits.view(dtype).view(shape)


def bits(of: torch.Tensor) -> bytes:
    return bytes(of.contiguous().reshape(-1).view(torch.uint8).tolist())


@given(st.lists(st.tuples(st.sampled_from(TYPES), SHAPES), max_size=12), st.integers(1, 2000), st.integers(0, 99))
def test_every_tensor_arrives_bit_by_bit(
    kinds: list[tuple[torch.dtype, tuple[int, ...]]], limit: int, seed: int
) -> None:
    tensors = [tensor(dtype, shape, seed + i) for i, (dtype, shape) in enumerate(kinds)]
    entries = [Entry.of(f"t{i}", t) for i, t in enumerate(tensors)]
    told = [Entry.read(json.loads(json.dumps([e.name, e.dtype, e.shape]))) for e in entries]
    assert told == entries
    arrived: list[tuple[str, torch.Tensor]] = []
    groups = list(buckets(entries, limit))
    assert [i for group in groups for i in group] == list(range(len(tensors)))
    for group in groups:
        some = [entries[i] for i in group]
        buffer = pack(some, [tensors[i] for i in group], CPU)
        assert buffer.numel() == layout(some)[1]
        assert buffer.numel() <= limit or len(group) == 1  # larger than a bucket: alone
        arrived += unpack(buffer, some)
    for (name, got), entry, sent in zip(arrived, entries, tensors, strict=True):
        assert (name, got.dtype, got.shape, bits(got)) == (entry.name, sent.dtype, sent.shape, bits(sent))


def test_tensors_in_any_order_of_memory_and_with_gradients() -> None:
    strided = torch.arange(12.0).view(3, 4).t()
    learnt = torch.nn.Parameter(torch.arange(5.0)[::2])
    entries = [Entry.of("a", strided), Entry.of("b", learnt)]
    (_, a), (_, b) = unpack(pack(entries, [strided, learnt], CPU), entries)
    assert torch.equal(a, strided) and torch.equal(b, learnt) and not b.requires_grad


def test_what_changed_since_it_was_announced_is_refused() -> None:
    entries = [Entry.of("a", torch.zeros(3))]
    for other in (torch.zeros(4), torch.zeros(3, dtype=torch.float64)):
        with pytest.raises(WireError, match=r"'a'.*is now"):
            pack(entries, [other], CPU)
    with pytest.raises(WireError, match="bucket of"):
        unpack(torch.zeros(63, dtype=torch.uint8), entries)


@pytest.mark.parametrize(
    "told",
    [
        None,
        [],
        ["a", "float32"],
        ["a", "float32", [1], 2],
        ["a", "Tensor", [1]],
        ["a", "os", [1]],
        ["a", 3, [1]],
        ["a", "float32", [-1]],
        ["a", "float32", [1.0]],
        ["a", "float32", [True]],
        ["a", "float32", "11"],
        [1, "float32", [1]],
    ],
)
def test_what_is_no_entry_is_refused(told: Any) -> None:
    with pytest.raises(WireError, match="name, type and shape"):
        Entry.read(told)


HANDLE = (0, b"\x00\xffhandle", 64, 0, b"/torch_1_2_3", 7, b"\x80event", True)


def test_handles_survive_json() -> None:
    """The only part of `ipc` that can run without a GPU."""
    assert decode_handle(json.loads(json.dumps(encode_handle(HANDLE)))) == HANDLE


@pytest.mark.parametrize(
    "told",
    [
        None,
        7,
        [],
        [*encode_handle(HANDLE)[:-1]],
        [*encode_handle(HANDLE)[:-1], 1],
        [0, {"base64": "%%"}, *encode_handle(HANDLE)[2:]],
        [0, {"other": ""}, *encode_handle(HANDLE)[2:]],
    ],
)
def test_what_is_no_handle_is_refused(told: Any) -> None:
    with pytest.raises(WireError, match="no CUDA IPC handle"):
        decode_handle(told)
    with pytest.raises(WireError, match="no CUDA IPC handle"):
        import_bucket(told, CPU)
