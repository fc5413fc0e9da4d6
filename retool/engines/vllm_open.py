"""From a recipe's `engine` section to a served engine: finds vLLM, starts a server or waits for those at `urls`."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import torch

from retool.config import EngineConfig
from retool.engines.vllm_adapter import CPU_HEAD_SIZES, How, Server, ServerLost
from retool.engines.vllm_engine import VllmEngine
from retool.engines.vllm_server import LocalServer, find_python
from retool.engines.vllm_weights import lora_arguments, save_base, save_merged
from retool.errors import UserError
from retool.lora import adapters, has_adapters


async def open_vllm(config: EngineConfig, model: Any, tokenizer: Any) -> VllmEngine:
    """The engine over `model`'s weights, its servers answering. Raises `UserError` when they cannot be had."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    context = config.context or longest
    if context is None:
        raise UserError("the model does not say how long its context is; set engine.context")
    if longest is not None and context > longest:
        raise UserError(f"engine.context is {context}, but the model knows only {longest} positions")
    if config.urls:
        servers = [Server(url.rstrip("/"), config.turn_s) for url in config.urls]
        local: dict[str, LocalServer] = {}
        try:
            await asyncio.gather(*(_answers(s, config.start_s) for s in servers))
        except BaseException:
            for server in servers:
                await server.close()
            raise
    else:
        own = await _start(config, model, tokenizer, context)
        servers, local = [Server(own.url, config.turn_s)], {own.url: own}
    return VllmEngine(
        model,
        tokenizer,
        servers,
        context=context,
        share=config.share,
        weight_sync=how_of(config, model),
        probe_tolerance=config.probe_tolerance,
        start_s=config.start_s,
        local=local,
        sleep=sleeps(config),
    )


async def _answers(server: Server, seconds: float) -> None:
    """Wait for a server that somebody else starts."""
    end = time.monotonic() + seconds
    while True:
        try:
            await server.check()
            return
        except ServerLost as error:
            if time.monotonic() > end:
                raise UserError(f"engine.urls: no answer within engine.start_s ({seconds:g} s): {error}") from error
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
    if config.weight_sync == "nccl":
        raise UserError("engine.weight_sync nccl is not available")
    return config.weight_sync


def check_heads(model: Any) -> None:
    """vLLM's attention on CPU knows few head sizes. Raises `UserError`."""
    text = model.config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if size not in CPU_HEAD_SIZES:
        raise UserError(
            f"engine.kind vllm: on CPU vLLM knows attention heads of {', '.join(map(str, CPU_HEAD_SIZES))} numbers, "
            f"this model has {size}; a tiny model can have others, e.g. model.tiny.hidden=128 model.tiny.heads=4"
        )
