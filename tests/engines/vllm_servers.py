"""vLLM servers for tests: one a model, started once, in an interpreter of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from retool.engines.vllm_adapter import Server
from retool.engines.vllm_engine import VllmEngine
from retool.engines.vllm_server import LocalServer, find_python
from retool.errors import UserError
from tests.engines.speakers import bpe_tokenizer, speaker, tag_tokenizer

LONG = 512
TIED = {"tags": True, "bpe": False}
SEED = {"tags": 2, "bpe": 0}  # of which the models learn their dialogue well enough
START_S = 600.0


@cache
def python() -> str | None:
    """The interpreter that has vLLM, if there is one."""
    try:
        return find_python(None)
    except UserError:
        return None


def tokenizer_of(kind: str) -> Any:
    return bpe_tokenizer() if kind == "bpe" else tag_tokenizer()


def model_of(kind: str) -> Any:
    """`tags`: tied embeddings, `bpe`: untied; heads of a size that vLLM knows on CPU."""
    return speaker(kind, head_dim=32, tied=TIED[kind], context=LONG, seed=SEED[kind])


def start(kind: str, folder: Path, more: Sequence[str] = ()) -> LocalServer:
    """A server that will answer soon. `more`: further arguments for vLLM."""
    found = python()
    if found is None:
        pytest.skip("no interpreter with vLLM: `make test-vllm` makes one, or set RETOOL_VLLM_PYTHON")
    model_of(kind).save_pretrained(folder)
    tokenizer_of(kind).save_pretrained(folder)
    server = LocalServer.new(found, str(folder), context=LONG, slots=16, cpu=True, more=more)
    server.start()
    return server


def answers(server: LocalServer) -> None:
    """Wait until it does."""

    async def ask() -> None:
        client = Server(server.url)
        try:
            await server.wait(START_S, client.check)
        finally:
            await client.close()

    asyncio.run(ask())


class Fleet:
    """The servers of a test session by kind, each started when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._servers: dict[str, LocalServer] = {}

    def server(self, kind: str) -> LocalServer:
        """It answers."""
        if kind not in self._servers:
            server = start(kind, self._folder / kind)
            self._stack.callback(server.remove)
            with ThreadPoolExecutor(1) as pool:  # a loop of its own: tests are inside one already
                pool.submit(answers, server).result()
            self._servers[kind] = server
        return self._servers[kind]

    def engine(self, kind: str, context: int = 128, urls: tuple[str, ...] = (), **options: Any) -> VllmEngine:
        """A new engine over a shared server."""
        servers = [Server(u) for u in (self.server(kind).url, *urls)]
        return VllmEngine(model_of(kind), tokenizer_of(kind), servers, context=context, **options)

    def close(self) -> None:
        self._stack.close()
