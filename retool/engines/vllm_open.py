"""From a recipe's `engine` section to a served engine: finds vLLM, starts a server or waits for those at `urls`."""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from retool.config import EngineConfig
from retool.engines.vllm_adapter import CPU_HEAD_SIZES, How, Server, ServerLost
from retool.engines.vllm_engine import VllmEngine
from retool.engines.vllm_server import LocalServer, find_python
from retool.engines.vllm_share import Share, Start, digest_of, is_start
from retool.engines.vllm_weights import digest_of_base, lora_arguments, save_base, save_merged
from retool.errors import UserError
from retool.lora import adapters, has_adapters

_log = logging.getLogger(__name__)
_TELL_EVERY_S = 15.0


async def open_vllm(config: EngineConfig, model: Any, tokenizer: Any) -> VllmEngine:
    """The engine over `model`'s weights, its servers answering. Raises `UserError` when they cannot be had."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    context = config.context or longest
    if context is None:
        raise UserError("the model does not say how long its context is; set engine.context")
    if longest is not None and context > longest:
        raise UserError(f"engine.context is {context}, but the model knows only {longest} positions")
    if config.urls:
        return await _join(config, model, tokenizer, context)
    own = await _start(config, model, tokenizer, context)
    local = {own.url: own}
    return VllmEngine(
        model, tokenizer, [Server(own.url, config.turn_s)], local=local, **_options(config, model, context)
    )


def _options(config: EngineConfig, model: Any, context: int) -> dict[str, Any]:
    return {
        "context": context,
        "share": config.share,
        "weight_sync": how_of(config, model),
        "probe_tolerance": config.probe_tolerance,
        "start_s": config.start_s,
        "sleep": sleeps(config),
        "sync_host": config.sync_host,
        "sync_s": config.sync_s,
    }


class _SharedEngine(VllmEngine):
    """Over servers that others started; gives the shared folder free, if there is one, when it is closed."""

    hold: Share | None

    async def close(self) -> None:
        await super().close()
        if self.hold is not None:
            self.hold.release()


async def _join(config: EngineConfig, model: Any, tokenizer: Any, context: int) -> VllmEngine:
    """Over servers at `engine.urls`; those that follow `engine.share` are told what to begin with. Without a share all
    are expected to have a model of their own."""
    how_of(config, model)  # raises before anything is waited for
    share = await asyncio.to_thread(Share, config.share) if config.share is not None else None
    servers = [Server(url.rstrip("/"), config.turn_s) for url in config.urls]
    try:
        start = None
        if share is not None and not all(await asyncio.gather(*(_by_hand(s) for s in servers))):
            start = await asyncio.to_thread(_publish, config, share, model, tokenizer, context)
        await asyncio.gather(*(answers(s, config.start_s, start) for s in servers))
        if share is not None:
            await asyncio.to_thread(share.sweep)
        engine = _SharedEngine(model, tokenizer, servers, **_options(config, model, context))
        engine.hold = share
        return engine
    except BaseException:
        for server in servers:
            await server.close()
        if share is not None:
            share.release()
        raise


async def _by_hand(server: Server) -> bool:
    """Whether it answers and was started with a model of its own."""
    try:
        await server.check()
        return not is_start(await server.root())
    except ServerLost:
        return False


def _publish(config: EngineConfig, share: Share, model: Any, tokenizer: Any, context: int) -> Start:
    """Put the model into the shared folder, where servers that can take its weights do not have it already."""
    adapter = how_of(config, model) == "adapter"
    about = model.config.to_dict() | ({"base": digest_of_base(model)} if adapter else {})
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        digest = digest_of(type(model).__name__, about, Path(folder))

    def save(target: Path) -> None:
        (save_base if adapter else save_merged)(model, target)
        tokenizer.save_pretrained(target)

    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return share.begin(digest, save, dtype=dtype, context=context, slots=config.slots)


async def answers(server: Server, seconds: float, start: Start | None = None) -> None:
    """Wait for a server that somebody else starts, and that begins with `start` if it follows a shared folder.
    Raises `UserError` when it does not come in time."""
    begun = told = time.monotonic()
    while True:
        try:
            await server.check()
            root = await server.root()
            if start is None or not is_start(root) or Path(root).name == start.folder:
                return
            why = f"{server.url} still has the model of an earlier run"
        except ServerLost as error:
            why = str(error)
        now = time.monotonic()
        if now - begun > seconds:
            raise UserError(
                f"engine.urls: not ready within engine.start_s ({seconds:g} s): {why}; see what the server prints, and "
                "whether it was started with --share and the folder of engine.share"
            )
        if now - told > _TELL_EVERY_S:
            told = now
            _log.warning("waiting for vLLM for %.0f s of at most %g: %s", now - begun, seconds, why)
        await asyncio.sleep(1.0)


async def _start(config: EngineConfig, model: Any, tokenizer: Any, context: int) -> LocalServer:
    """A server of this run's own, over the weights as they are now."""
    python = await asyncio.to_thread(find_python, config.python)
    cpu = not torch.cuda.is_available()
    if cpu:
        check_heads(model)
    parameter = next(model.parameters())
    options = {
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "context": context,
        "slots": config.slots,
        "cpu": cpu,
        "more": config.server_args,
    }
    adapter = how_of(config, model) == "adapter"
    if adapter:
        rank = next(iter(adapters(model).values())).rank
        options["more"] = (*lora_arguments(rank), *config.server_args)
    if sleeps(config):
        options["more"] = ("--enable-sleep-mode", *options["more"])
    own = LocalServer.new(python, "", **options)
    start = own.folder / "model"
    server = Server(own.url)
    try:
        await asyncio.to_thread(save_base if adapter else save_merged, model, start)
        await asyncio.to_thread(tokenizer.save_pretrained, start)
        await asyncio.to_thread(own.start, str(start))
        await own.wait(config.start_s, server.check)
    except BaseException:
        await asyncio.to_thread(own.remove)
        raise
    finally:
        await server.close()
    return own


def sleeps(config: EngineConfig) -> bool:
    """Whether servers leave their GPU to the learner between rollouts; without being asked only one of this run's own
    does. Raises `UserError` where there is no GPU."""
    if config.urls:
        return bool(config.sleep)
    if config.sleep and not torch.cuda.is_available():
        raise UserError("engine.sleep: there is no GPU here that a server could leave; remove the key")
    return torch.cuda.is_available() if config.sleep is None else config.sleep


def how_of(config: EngineConfig, model: Any) -> How:
    """`auto` sends adapters alone only to a server of this run's own, whose base is surely the learner's."""
    if config.weight_sync == "auto":
        return "adapter" if has_adapters(model) and not config.urls else "file"
    if config.weight_sync in ("nccl", "ipc") and next(model.parameters()).device.type != "cuda":
        raise UserError(
            f"engine.weight_sync {config.weight_sync} needs a learner on a CUDA device; set engine.weight_sync=gloo "
            "(over the network, any device) or file (a folder that both see)"
        )
    return config.weight_sync


def check_heads(model: Any) -> None:
    """vLLM's attention on CPU knows few head sizes. Raises `UserError`."""
    text = model.config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if size not in CPU_HEAD_SIZES:
        raise UserError(
            f"engine.kind vllm: on CPU vLLM knows attention heads of {', '.join(map(str, CPU_HEAD_SIZES))} numbers, "
            f"this model has {size}; a tiny model can have others: model.tiny.head_dim=32"
        )
