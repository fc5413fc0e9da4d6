"""What retool adds to a vLLM server. Runs in vLLM's interpreter and imports vLLM, torch and the files that
`vllm_server.write_plugin` puts beside it.

- `Bans`: a logits processor that forbids every token which would complete a banned string (and, before `min_tokens`, a
  stop string or the end of the text). It works before log-probs are taken, so they are renormalised as in the
  embedded engine. A request carries `vllm_xargs`: `retool_banned`, `retool_early` (JSON lists of strings),
  `retool_early_ids` (JSON list of token ids), `retool_min_tokens` and `retool_tail` (JSON list of token ids sampled in
  this turn before).
- `Weights`: a weight transfer engine that reads safetensors from a folder which learner and server share, or takes
  buckets over a process group with the learner.
- `WorkerExtension`: makes every worker know `Weights`.

The server is started with --logits-processors, --worker-extension-cls and --weight-transfer-config (vllm_server.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from .text import Bans as BannedTokens
from .text import Pieces, Tail
from .weight_group import Invitation, Receiver

BACKEND = "retool"
Processor = Callable[[list[int], torch.Tensor], torch.Tensor]


class Bans(AdapterLogitsProcessor):
    """Forbids strings, whichever tokens spell them."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        super().__init__(vllm_config, device, is_pin_memory)
        model = vllm_config.model_config
        tokenizer = AutoTokenizer.from_pretrained(model.tokenizer, revision=model.tokenizer_revision)
        self.pieces = Pieces(tokenizer, model.get_vocab_size())
        self.device = device
        self._known: dict[tuple[tuple[str, ...], frozenset[int]], BannedTokens] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        _Request.of(sampling_params)

    def new_req_logits_processor(self, params: SamplingParams) -> Processor | None:
        request = _Request.of(params)
        if not request.banned and not request.min_tokens:
            return None
        bans = self._tokens(request.banned, frozenset()) if request.banned else None
        early = None
        if request.min_tokens:
            early = self._tokens((*request.banned, *request.early), frozenset(request.early_ids))
        return _Bouncer(self.pieces, request, bans, early)

    def _tokens(self, strings: tuple[str, ...], ids: frozenset[int]) -> BannedTokens:
        key = (tuple(dict.fromkeys(strings)), ids)
        if key not in self._known:
            self._known[key] = BannedTokens(self.pieces, key[0], ids, self.device)
        return self._known[key]


@dataclass(frozen=True)
class _Request:
    banned: tuple[str, ...]
    early: tuple[str, ...]
    early_ids: tuple[int, ...]
    min_tokens: int
    tail: tuple[int, ...]

    @classmethod
    def of(cls, params: SamplingParams) -> _Request:
        """Raises `ValueError` for what is not what the engine sends."""
        extra = params.extra_args or {}
        lists = {}
        for name, kind in (("banned", str), ("early", str), ("early_ids", int), ("tail", int)):
            found = json.loads(extra.get(f"retool_{name}", "[]"))
            if not isinstance(found, list) or not all(isinstance(x, kind) for x in found):
                raise ValueError(f"retool_{name} must be a JSON list of {kind.__name__}")
            lists[name] = tuple(found)
        return cls(**lists, min_tokens=int(extra.get("retool_min_tokens", 0)))


class _Bouncer:
    """The bans of one request: follows the text as it grows."""

    def __init__(
        self, pieces: Pieces, request: _Request, bans: BannedTokens | None, early: BannedTokens | None
    ) -> None:
        self.bans, self.early, self.min_tokens = bans, early, request.min_tokens
        self.keep = max((len(s) for s in (*request.banned, *request.early)), default=1)
        self.tail = Tail(pieces)
        for token in request.tail:
            self.tail.push(token, (), self.keep)
        self.seen = 0

    def __call__(self, output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        for token in output_ids[self.seen :]:
            self.tail.push(token, (), self.keep)
        self.seen = len(output_ids)
        bans = self.early if self.early is not None and self.seen < self.min_tokens else self.bans
        if bans is not None:
            mask = bans.mask(self.tail.text)
            logits[: mask.shape[0]].masked_fill_(mask[: logits.shape[0]], -torch.inf)
        return logits


@dataclass
class _Init(WeightTransferInitInfo):
    """`group`: a `weight_group.Invitation`; None: weights come as files, and nothing has to be agreed on."""

    group: dict[str, Any] | None = None


@dataclass
class _Update(WeightTransferUpdateInfo):
    """`folder`: holds `*.safetensors` with all weights under their checkpoint names. `bucket`: some of the weights, as
    `weight_group.Receiver.receive` takes them."""

    folder: str | None = None
    bucket: dict[str, Any] | None = None


class Weights(WeightTransferEngine[_Init, _Update]):
    """Whole weights, loaded in place layer by layer."""

    init_info_cls = _Init
    update_info_cls = _Update
    supports_draft_weight_update = False
    _receiver: Receiver | None = None
    _half = False  # an update has begun and not ended

    def init_transfer_engine(self, init_info: _Init) -> None:
        """Join the learner's group."""
        if init_info.group is None:
            return
        invitation, old = Invitation.read(init_info.group), self._receiver
        busy = ""
        if old is not None and old.invitation.run != invitation.run and old.alive():
            busy = "this server gets the weights of another run, which is still there"
        config = self.parallel_config
        rank = config.data_parallel_index * config.world_size + config.rank
        made = Receiver(invitation, rank, self.device, busy)
        self.shutdown()
        self._receiver = made

    def start_weight_update(self) -> None:
        if self._half:  # what came before it broke off must not count as loaded
            finalize_layerwise_reload(self.model, self.model_config)
        self._half = True
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: _Update) -> None:
        if update_info.bucket is not None:
            if self._receiver is None:
                raise RuntimeError("no group: this server was started anew")
            self.model.load_weights(iter(self._receiver.receive(update_info.bucket)))
            return
        files = sorted(Path(update_info.folder or "").glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"no safetensors in {update_info.folder}: is the folder mounted here?")
        for file in files:
            self.model.load_weights(iter(load_file(file).items()))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        for layer in self.model.modules():
            # on CPU a tied head keeps its own packed copy of the embedding, which nothing above renews
            if isinstance(layer, ParallelLMHead) and hasattr(layer, "cpu_linear"):
                layer.quant_method.process_weights_after_loading(layer)
        self._half = False

    def shutdown(self) -> None:
        """Leave the group."""
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.close()


class WorkerExtension:
    """Mixed into vLLM's worker class: importing this module is what counts."""


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, Weights)
