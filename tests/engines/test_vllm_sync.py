"""Weights over a process group (`engine.weight_sync: gloo`) into real vLLM servers, one of them over HTTP and started
by hand as for `engine.urls`.

Needs an interpreter with vLLM ($RETOOL_VLLM_PYTHON or .venv-vllm/bin/python): `make test-vllm`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from retool.config import EngineConfig, LoraConfig
from retool.engines import vllm_group
from retool.engines.base import EngineError, Sampling
from retool.engines.vllm_adapter import Server, ServerLost
from retool.engines.vllm_engine import VllmEngine
from retool.engines.vllm_open import open_vllm
from retool.lora import adapters, add_adapters
from retool.recipe import load_recipe
from retool.train import train
from tests.engines.contract import turns_amid_updates
from tests.engines.speakers import PROMPT, encode
from tests.engines.vllm_servers import LONG, START_S, Fleet, answers, model_of, python, start, tokenizer_of

pytestmark = [pytest.mark.stack, pytest.mark.slow]

REPO = Path(__file__).parents[2]
KILLED = """
import asyncio, os, sys, time
sys.path.insert(0, "")
from retool.engines import vllm_group
from retool.engines.vllm_adapter import Server
from retool.engines.vllm_engine import VllmEngine
from tests.engines.vllm_servers import model_of, tokenizer_of
url, name, number = sys.argv[1:]
owner = vllm_group if name == "pack" else vllm_group.Group
whole, calls = getattr(owner, name), []

def then_die(*args):
    calls.append(1)
    if len(calls) == int(number):
        time.sleep(0.5)  # for the request that announces what is not sent
        os.kill(os.getpid(), 9)
    return whole(*args)

setattr(owner, name, then_die)
vllm_group.BUCKET = 40_000
made = VllmEngine(model_of("tags"), tokenizer_of("tags"), [Server(url)], context=128, weight_sync="gloo")
asyncio.run(made.sync(None, 0))
"""


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a server with a model of its own, as somebody starts it on another machine."""
    found = python()
    if found is None:
        pytest.skip("no interpreter with vLLM: `make test-vllm` makes one, or set RETOOL_VLLM_PYTHON")
    folder = tmp_path_factory.mktemp("by-hand")
    model_of("tags").save_pretrained(folder)
    tokenizer_of("tags").save_pretrained(folder)
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    more = ["--host", "127.0.0.1", "--port", str(port), "--context", str(LONG), "--slots", "16", "--cpu"]
    command = [sys.executable, "-m", "retool.engines.vllm_server", str(folder), *more, "--python", found]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=REPO, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


async def joined(url: str, model: Any) -> VllmEngine:
    """An engine over a server by URL, as a recipe opens it; no shared folder."""
    config = EngineConfig(kind="vllm", urls=(url,), weight_sync="gloo", context=LONG, start_s=START_S)
    return await open_vllm(config, model, tokenizer_of("tags"))


def moved(model: Any, seed: int = 0) -> None:
    """As an optimiser does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn(p.shape, generator=generator))


async def said(engine: VllmEngine, kind: str, tokens: int = 24) -> Any:
    """A greedy turn, checked against a forward pass of the learner's model."""
    tok = tokenizer_of(kind)
    prompt = encode(tok, PROMPT * 5)
    session = await engine.open(prompt, seed=1)
    turn = await session.generate(Sampling(tokens, temperature=0, min_tokens=tokens))
    ids = list(session.ids)
    await session.close()
    with torch.no_grad():
        logits = engine._model(input_ids=torch.tensor([ids])).logits[0].float()
    logits[:, tok.eos_token_id] = -torch.inf
    logp = torch.log_softmax(logits, -1)
    full = [float(logp[i - 1, ids[i]]) for i in range(len(prompt), len(ids))]
    assert max(abs(a - b) for a, b in zip(turn.logprobs, full, strict=True)) <= 1e-4
    return turn


@pytest.mark.parametrize("kind", ["tags", "bpe"])
async def test_the_server_says_what_the_learner_says_after_every_update(
    fleet: Fleet, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tied (`tags`) and untied embeddings; more than ten buckets."""
    monkeypatch.setattr(vllm_group, "BUCKET", 40_000)
    engine = fleet.engine(kind, context=LONG, weight_sync="gloo")
    turns = []
    for version in range(3):
        await engine.sync(None, version)
        turns.append(await said(engine, kind))
        assert turns[-1].versions == ((0, version),)
        moved(engine._model, version)
    assert len({t.logprobs for t in turns}) == 3 and engine.largest_gap <= 1e-4
    assert len(list(vllm_group.buckets(_entries(engine._model), 40_000))) > 10
    await engine.close()


def _entries(model: Any) -> list[Any]:
    return [vllm_group.Entry.of(n, t) for n, t in vllm_group.outgoing(model).items()]


@pytest.mark.parametrize("kind", ["tags", "bpe"])
async def test_a_file_and_a_group_leave_the_same_weights(fleet: Fleet, kind: str) -> None:
    model, turns = model_of(kind), []
    moved(model, 7)
    for how in ("file", "gloo", "file"):
        options: dict[str, Any] = {"context": LONG, "weight_sync": how}
        engine = VllmEngine(model, tokenizer_of(kind), [Server(fleet.server(kind).url)], **options)
        turns.append(await said(engine, kind, 48))
        await engine.close()
    assert len({(t.ids, t.logprobs) for t in turns}) == 1


async def test_trajectories_survive_updates_in_flight(fleet: Fleet) -> None:
    engine, tok = fleet.engine("tags", context=LONG, weight_sync="gloo"), tokenizer_of("tags")

    async def update(version: int) -> None:
        moved(engine._model, version)
        await engine.sync(None, version)

    turns, versions = await turns_amid_updates(engine, encode(tok, PROMPT), update)
    assert all(len(c.ids) == 200 and c.finish == "length" for c in turns)
    assert {c.versions[-1][1] for c in turns} == {versions[-1]}
    assert engine.largest_gap <= 1e-4
    await engine.close()


async def test_adapters_are_merged_on_the_way(fleet: Fleet) -> None:
    model = model_of("tags")
    add_adapters(model, LoraConfig(rank=4), seed=0)
    options: dict[str, Any] = {"context": LONG, "weight_sync": "gloo"}
    engine = VllmEngine(model, tokenizer_of("tags"), [Server(fleet.server("tags").url)], **options)
    turns = []
    for version in range(2):
        await engine.sync(None, version)
        turns.append(await said(engine, "tags"))
        with torch.no_grad():
            for layer in adapters(model).values():
                layer.lora_B.add_(0.1 * torch.randn_like(layer.lora_B))
    assert turns[0].logprobs != turns[1].logprobs and engine.largest_gap <= 1e-4
    await engine.close()


async def test_two_workers_of_one_server_get_their_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor parallel: ranks 1 and 2 of the group."""
    monkeypatch.setattr(vllm_group, "BUCKET", 40_000)
    own = await asyncio.to_thread(start, "tags", tmp_path / "model", ["--tensor-parallel-size", "2"])
    try:
        await asyncio.to_thread(answers, own)
        server = Server(own.url)
        assert await server.workers() == 2
        options: dict[str, Any] = {"context": LONG, "weight_sync": "gloo"}
        engine = VllmEngine(model_of("tags"), tokenizer_of("tags"), [server], **options)
        for version in range(3):
            await engine.sync(None, version)
            await said(engine, "tags")
            moved(engine._model, version)
        await engine.close()
    finally:
        await asyncio.to_thread(own.remove)


async def test_a_server_by_url_needs_no_folder(by_hand: str) -> None:
    engine = await joined(by_hand, model_of("tags"))
    for version in range(2):
        await engine.sync(None, version)
        await said(engine, "tags")
        moved(engine._model, version)
    other = VllmEngine(model_of("tags"), tokenizer_of("tags"), [Server(by_hand)], context=128, weight_sync="gloo")
    with pytest.raises(EngineError, match="weights of another run, which is still there"):
        await other.sync(None, 0)
    await other.close()
    moved(engine._model, 5)
    await engine.sync(None, 5)  # undisturbed
    await said(engine, "tags")
    await engine.close()


async def test_a_learner_that_is_killed_amid_an_update_leaves_a_server_for_the_next_run(by_hand: str) -> None:
    await (await joined(by_hand, model_of("tags"))).close()  # it answers
    for seed, (name, number) in enumerate((("pack", 4), ("broadcast", 4), ("broadcast", 5), ("broadcast", 6))):
        command = [sys.executable, "-c", KILLED, by_hand, name, str(number)]
        killed = await asyncio.to_thread(subprocess.run, command, cwd=REPO, capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        model = model_of("tags")
        moved(model, seed)
        engine = await joined(by_hand, model)
        await engine.sync(None, 0)
        await said(engine, "tags")
        await engine.close()


async def test_a_server_that_is_killed_between_and_amid_updates(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time the other server goes on, nothing hangs, and it comes back with the weights of then."""
    monkeypatch.setattr(vllm_group, "BUCKET", 40_000)
    own = await asyncio.to_thread(start, "tags", tmp_path / "model")

    def kill() -> None:
        assert own._process is not None
        with suppress(ProcessLookupError):
            os.killpg(own._process.pid, signal.SIGKILL)

    try:
        await asyncio.to_thread(answers, own)
        engine = fleet.engine("tags", context=LONG, urls=(own.url,), local={own.url: own}, weight_sync="gloo")
        mine, theirs = engine._replicas[1], engine._replicas[0]
        await engine.sync(None, 0)
        for version, when in ((1, kill), (2, None)):
            moved(engine._model, version)
            if when is not None:
                when()
            else:
                _then(monkeypatch, own.url, kill)
            await engine.sync(None, version)
            monkeypatch.undo()
            monkeypatch.setattr(vllm_group, "BUCKET", 40_000)
            assert theirs.good and not mine.good and isinstance(mine.lost, ServerLost)
            assert (await said(engine, "tags")).versions == ((0, version),)  # the other one; looks for the lost one
            await _until(lambda: mine.good)
            assert mine.tag == theirs.tag == engine._weights.tag
        moved(engine._model, 9)
        await engine.sync(None, 9)
        assert mine.good and theirs.good and engine.largest_gap <= 1e-4
        await engine.close()
    finally:
        await asyncio.to_thread(own.remove)


def _then(monkeypatch: pytest.MonkeyPatch, url: str, do: Callable[[], None]) -> None:
    """`do` before the fourth bucket to that server."""
    ship, shipped = vllm_group.WeightGroups._ship, []

    async def counted(self: Any, server: Server, *args: Any) -> None:
        if server.url == url:
            shipped.append(1)
            if len(shipped) == 4:
                asyncio.get_running_loop().call_later(0.001, do)
        await ship(self, server, *args)

    monkeypatch.setattr(vllm_group.WeightGroups, "_ship", counted)


async def _until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + START_S
    while not holds():
        assert time.monotonic() < end
        await asyncio.sleep(0.5)


async def test_a_recipe_trains_over_a_group(tmp_path: Path) -> None:
    if python() is None:
        pytest.skip("no interpreter with vLLM: `make test-vllm` makes one, or set RETOOL_VLLM_PYTHON")
    overrides = ["engine.kind=vllm", "deterministic=false", "steps=2", f"out={tmp_path / 'run'}"]
    overrides += ["model.tiny.hidden=64", "model.tiny.heads=2", "learner.threads=1", f"engine.python={python()}"]
    result = await train(load_recipe("recipes/tiny.yaml", [*overrides, "engine.weight_sync=gloo"]))
    assert [m["version"] for m in result.metrics] == sorted({m["version"] for m in result.metrics})
    for m in result.metrics:
        assert m.get("count/infra_failures", 0) == 0 and m.get("count/stale_turns", 0) == 0
        assert m["max_logprob_gap"] <= 1e-4 and m["grad_norm/policy"] > 0
