"""How fast this machine is for a given architecture: one layer of it is timed for about a second.

The layer has random weights and a small vocabulary, so it is made in a moment, whatever the model's size.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_VOCABULARY = 128
_ROWS, _WIDTH = 8, 128
_EACH_S = 0.2
"""Time for each of the four measurements (one that takes longer is made once)."""


@dataclass(frozen=True)
class Pace:
    """Seconds: of one decode tick through one layer for all slots; of one layer forward, and forward and backward, a
    token; of the output layer a token. `measured_s`: what finding out took."""

    decode_layer_s: float
    forward_layer_s: float
    train_layer_s: float
    head_s: float
    measured_s: float


def one_layer(config: Any, device: torch.device, dtype: str) -> Any:
    """The backbone that `config` describes with a single layer and few tokens, with random weights."""
    from transformers import AutoModel

    small = copy.deepcopy(config.get_text_config())
    if getattr(small, "layer_types", None):
        small.layer_types = list(small.layer_types)[:1]
    small.num_hidden_layers, small.vocab_size = 1, _VOCABULARY
    small.pad_token_id = small.bos_token_id = small.eos_token_id = None
    with torch.random.fork_rng(devices=[]), torch.device(device):
        return AutoModel.from_config(small, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()


def calibrate(config: Any, device: torch.device, dtype: str, slots: int, threads: int | None = None) -> Pace:
    """`config`: of the whole model. `threads`: of the CPU while measuring. Raises what making one layer raises."""
    before = torch.get_num_threads()
    started = time.perf_counter()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        layer = one_layer(config, device, dtype)
        ids = torch.randint(1, _VOCABULARY, (_ROWS, _WIDTH), device=device)
        tick = torch.randint(1, _VOCABULARY, (slots, 1), device=device)
        hidden = torch.randn(_ROWS * _WIDTH, layer.config.hidden_size, device=device, dtype=getattr(torch, dtype))
        head = torch.randn(min(config.get_text_config().vocab_size, 32_768), layer.config.hidden_size).to(hidden)

        def decode() -> None:
            with torch.no_grad():
                layer(input_ids=tick, use_cache=False)

        def forward() -> None:
            with torch.no_grad():
                layer(input_ids=ids, use_cache=False)

        def train() -> None:
            out: Tensor = layer(input_ids=ids, use_cache=False).last_hidden_state
            out.float().square().mean().backward()
            layer.zero_grad(set_to_none=True)

        def logits() -> None:
            torch.log_softmax((hidden @ head.T).float(), -1)

        tokens = _ROWS * _WIDTH
        share = config.get_text_config().vocab_size / len(head)
        return Pace(
            decode_layer_s=_time(decode, device),
            forward_layer_s=_time(forward, device) / tokens,
            train_layer_s=_time(train, device) / tokens,
            head_s=_time(logits, device) * share / tokens,
            measured_s=time.perf_counter() - started,
        )
    finally:
        torch.set_num_threads(before)


def _time(work: Callable[[], None], device: torch.device) -> float:
    """Seconds of one call: the fastest of as many as fit into the time, after one to warm up."""
    best, spent, first = float("inf"), 0.0, True
    while first or spent < _EACH_S:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took = time.perf_counter() - started
        if not first or took > _EACH_S:
            best, spent = min(best, took), spent + took
        first = False
    return best
