"""Everything a rollout needs, opened together from a recipe and closed together: sandbox, codec, rewarder, engine."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from retool.config import Recipe, SandboxConfig
from retool.engines.base import Engine
from retool.engines.transformers_engine import TransformersEngine
from retool.errors import UserError
from retool.protocols import build_protocol
from retool.protocols.base import ToolProtocol
from retool.protocols.codec import Codec
from retool.rewards import Rewarder
from sandbox.docker_box import DockerSandbox
from sandbox.local import LocalSandbox
from sandbox.names import addresses
from sandbox.remote import RemoteSandbox
from sandbox.types import Limits, Sandbox


@dataclass
class Workshop:
    """Open parts; valid inside `open_workshop` only."""

    sandbox: Sandbox
    protocol: ToolProtocol
    codec: Codec
    rewarder: Rewarder
    engine: Engine


def make_sandbox(config: SandboxConfig) -> LocalSandbox | RemoteSandbox | DockerSandbox:
    """The sandbox of a recipe, not yet started. Raises `UserError` when its token is not there, `SandboxUnavailable`
    for a name without an address."""
    limits = Limits(wall_s=config.wall_s, cpu_s=config.cpu_s, memory_mb=config.memory_mb)
    if config.kind == "remote":
        token = os.environ.get(config.token_env) if config.token_env is not None else None
        if config.token_env is not None and not token:
            raise UserError(f"sandbox.token_env: the environment has no variable {config.token_env}, or an empty one")
        try:
            return RemoteSandbox(addresses(config.urls), token=token, profile=config.profile, limits=limits)
        except ValueError as error:
            raise UserError(f"sandbox, of the recipe: {error}") from None
    if config.kind == "docker":
        return DockerSandbox(
            config.image,
            runtime=config.runtime,
            memory_mb=config.container_memory_mb,
            workers=config.workers,
            profile=config.profile,
            limits=limits,
        )
    return LocalSandbox(
        profile=config.profile, workers=config.workers, limits=limits, allow_unconfined=config.allow_unconfined
    )


async def make_engine(recipe: Recipe, model: Any, tokenizer: Any, lockstep: bool = False) -> Engine:
    """The engine of a recipe, over the weights of `model` as they are at each `sync(None, version)`. Raises `UserError`
    when a server cannot be had."""
    config = recipe.engine
    if config.kind == "vllm":
        from retool.engines.vllm_open import open_vllm

        return await open_vllm(config, model, tokenizer)
    return TransformersEngine(model, tokenizer, slots=config.slots, context=config.context, lockstep=lockstep)


@asynccontextmanager
async def open_workshop(
    recipe: Recipe, model: Any, tokenizer: Any, *, lockstep: bool = False
) -> AsyncIterator[Workshop]:
    """Start every part; raises `SandboxError` or `UserError` when one cannot be had."""
    codec = Codec(tokenizer, build_protocol(recipe.protocol))
    engine = await make_engine(recipe, model, tokenizer, lockstep)
    try:
        async with (
            make_sandbox(recipe.sandbox) as sandbox,
            Rewarder(recipe.reward, codec.protocol, sandbox) as rewarder,
        ):
            yield Workshop(sandbox, codec.protocol, codec, rewarder, engine)
    finally:
        await engine.close()
