"""The served engine keeps the contract over real vLLM servers, and says what the embedded engine says.

Needs an interpreter with vLLM ($RETOOL_VLLM_PYTHON or .venv-vllm/bin/python): `make test-vllm`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from retool.config import LoraConfig
from retool.engines.base import Completion, EngineError, Sampling
from retool.engines.transformers_engine import TransformersEngine
from retool.engines.vllm_adapter import Server
from retool.engines.vllm_engine import ProbeMismatch, VllmEngine, VllmSession
from retool.engines.vllm_server import LocalServer
from retool.engines.vllm_weights import lora_arguments
from retool.lora import adapters, add_adapters
from retool.recipe import load_recipe
from retool.train import train
from tests.engines.contract import ATTEMPTS, WeightsContract, amid_update, ticks, turns_amid_updates
from tests.engines.speakers import PROMPT, RESULT, STOP, TURN, encode
from tests.engines.vllm_servers import LONG, Fleet, answers, model_of, python, start, tokenizer_of

pytestmark = [pytest.mark.stack, pytest.mark.slow]


class TestVllm(WeightsContract):
    """`tags` is a model with tied embeddings, `bpe` one without."""

    long = 480  # a server does not wait for us

    @pytest.fixture(autouse=True)
    def _servers(self, fleet: Fleet) -> None:
        self.fleet = fleet

    def tokenizer(self, kind: str) -> Any:
        return tokenizer_of(kind)

    def make(self, kind: str, slots: int = 8, **options: Any) -> VllmEngine:
        return self.fleet.engine(kind, context=LONG, **options)

    def model(self, engine: VllmEngine) -> Any:
        return engine._model


def embedded(kind: str) -> TransformersEngine:
    return TransformersEngine(model_of(kind), tokenizer_of(kind), slots=4, context=LONG)


@pytest.mark.parametrize("kind", ["tags", "bpe"])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(40, temperature=0, stop=(STOP,)),
        Sampling(40, temperature=0, stop=(STOP,), banned=("run",)),
        Sampling(40, temperature=0, stop=(STOP,), min_tokens=30),
        Sampling(7, temperature=0, stop=(STOP, "x = ")),
    ],
    ids=["plain", "banned", "min_tokens", "short"],
)
async def test_the_same_episode_through_both_engines(fleet: Fleet, kind: str, sampling: Sampling) -> None:
    tok = tokenizer_of(kind)
    episodes = []
    for engine in (embedded(kind), fleet.engine(kind, context=LONG)):
        session = await engine.open(encode(tok, PROMPT), seed=3)
        turns = []
        for _ in range(4):
            turns.append(await session.generate(sampling))
            await session.append(encode(tok, RESULT))
        episodes.append((session.ids, turns))
        await engine.close()
    (ours_ids, ours), (theirs_ids, theirs) = episodes
    assert ours_ids == theirs_ids
    for a, b in zip(ours, theirs, strict=True):
        assert (a.ids, a.finish, a.stop) == (b.ids, b.finish, b.stop)
        assert max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True)) <= 1e-4


async def test_prefill_grows_with_what_is_new_not_with_the_square(fleet: Fleet) -> None:
    """Blocks of 32 tokens are cached whole, so a turn may compute up to 32 tokens again, never the whole prefix."""
    engine, tok = fleet.engine("tags", context=LONG), tokenizer_of("tags")
    server = Server(fleet.server("tags").url)
    prompt, result = encode(tok, PROMPT * 9), encode(tok, RESULT * 5)
    session = await engine.open(prompt, seed=1)

    async def computed() -> float:
        return (await server.metrics())["vllm:prompt_tokens_by_source_total/local_compute"]

    before, turns, whole = await computed(), 10, 0
    for _ in range(turns):
        whole += len(session.ids)
        await session.generate(Sampling(8, temperature=1.0, min_tokens=8))
        await session.append(result)
    spent = await computed() - before
    new = len(prompt) + (turns - 1) * len(result)
    assert engine.stats()["prefilled"] == new
    assert new <= spent <= new + turns * 33 < whole / 2
    await server.close()
    await engine.close()


async def test_other_weights_change_what_is_said_and_the_cache_is_forgotten(fleet: Fleet) -> None:
    """Untied embeddings; the prefix was computed under the old weights."""
    engine, tok = fleet.engine("bpe"), tokenizer_of("bpe")
    prompt = encode(tok, PROMPT * 8)
    session = await engine.open(prompt, seed=1)
    await session.generate(Sampling(6, temperature=0))
    with torch.no_grad():
        for p in engine._model.parameters():
            p.add_(0.03 * torch.randn_like(p))
    await engine.sync(None, version=3)
    c = await session.generate(Sampling(12, temperature=0, min_tokens=12))
    ids = list(session.ids)
    with torch.no_grad():
        logits = engine._model(input_ids=torch.tensor([ids])).logits[0]
    logits[:, tok.eos_token_id] = -torch.inf
    logp = torch.log_softmax(logits, -1)
    start_at = len(ids) - len(c.ids)
    full = [float(logp[i - 1, ids[i]]) for i in range(start_at, len(ids))]
    assert c.versions == ((0, 3),)
    assert max(abs(a - b) for a, b in zip(c.logprobs, full, strict=True)) <= 1e-4
    assert engine.largest_gap <= 1e-4
    await engine.close()


async def test_the_probe_stops_a_run_whose_server_kept_its_old_head(fleet: Fleet) -> None:
    """vLLM's `reload_weights` leaves the packed head of tied embeddings as it was on CPU."""
    engine = fleet.engine("tags", weight_sync="reload")
    try:
        await engine.sync(None, 0)
        with torch.no_grad():
            engine._model.get_input_embeddings().weight.add_(0.05)
            engine._model.get_input_embeddings().weight.mul_(1.3)
        with pytest.raises(ProbeMismatch, match="weight_sync is reload"):
            await engine.sync(None, 1)
    finally:
        await engine.close()


async def test_reload_works_for_untied_embeddings(fleet: Fleet) -> None:
    engine = fleet.engine("bpe", weight_sync="reload")
    with torch.no_grad():
        engine._model.get_output_embeddings().weight.mul_(1.3)
    await engine.sync(None, 1)
    assert engine.largest_gap <= 1e-4
    await engine.close()


async def test_eight_trajectories_survive_updates_in_flight(fleet: Fleet) -> None:
    engine, tok = fleet.engine("tags", context=LONG), tokenizer_of("tags")
    said, versions = await turns_amid_updates(engine, encode(tok, PROMPT), partial(engine.sync, None))
    assert all(len(c.ids) == 200 and c.finish == "length" for c in said)
    assert {c.versions[-1][1] for c in said} == {versions[-1]}
    await engine.close()


async def test_a_killed_server_costs_retries_only_and_comes_back_with_the_newest_weights(
    fleet: Fleet, tmp_path: Path
) -> None:
    own = await asyncio.to_thread(start, "tags", tmp_path / "model")
    try:
        await asyncio.to_thread(answers, own)
        engine = fleet.engine("tags", context=LONG, urls=(own.url,), local={own.url: own})
        tok = tokenizer_of("tags")
        sessions = [await engine.open(encode(tok, PROMPT), seed=i) for i in range(4)]
        assert sorted(s.url for s in sessions) == sorted([own.url, fleet.server("tags").url] * 2)  # least loaded
        lost, turn = await killed_amid(engine, own, sessions)
        with pytest.raises(EngineError):
            await turn
        await lost.close()
        again = await engine.open(lost.ids, seed=0)
        assert again.url == fleet.server("tags").url
        assert tok.decode((await again.generate(Sampling(64, temperature=0, stop=(STOP,)))).ids) == TURN.rstrip("\n")
        with torch.no_grad():
            engine._model.lm_head.weight.mul_(1.05)
        await engine.sync(None, 1)
        end = time.monotonic() + 600
        while any(not r.good for r in engine._replicas) and time.monotonic() < end:  # noqa: ASYNC110
            await asyncio.sleep(0.5)
        assert all(r.good and r.tag == engine._weights.tag for r in engine._replicas)
        # the lifeline: a server whose starter is gone ends itself
        process = own._process
        assert process is not None and process.stdin is not None
        process.stdin.close()
        assert await asyncio.to_thread(process.wait, 300) != 0
        await engine.close()
    finally:
        await asyncio.to_thread(own.remove)


async def killed_amid(
    engine: VllmEngine, server: LocalServer, sessions: Sequence[VllmSession]
) -> tuple[VllmSession, asyncio.Task[Completion]]:
    """Kill `server` while it says a turn: it is stopped first, and goes on if all of the turn had been sent by then."""
    assert server._process is not None
    group = server._process.pid
    lost = next(s for s in sessions if s.url == server.url)
    for _ in range(ATTEMPTS):
        branch = (await lost.fork(1))[0]
        turn = asyncio.create_task(branch.generate(Sampling(480, temperature=1.0, min_tokens=480)))
        await ticks(engine, engine.stats()["ticks"] + 1, [turn])
        os.killpg(group, signal.SIGSTOP)
        read = -1
        while read < engine.stats()["ticks"]:  # what was sent before
            read = engine.stats()["ticks"]
            await asyncio.sleep(0.3)
        if not turn.done():
            os.killpg(group, signal.SIGKILL)
            return branch, turn
        os.killpg(group, signal.SIGCONT)
        assert len((await turn).ids) == 480
        await branch.close()
    pytest.fail(f"in {ATTEMPTS} attempts the server was never stopped amid a turn")


async def test_adapters_go_over_alone_and_say_what_the_learner_says(tmp_path: Path) -> None:
    """Over three versions: greedy ids and log-probs of the served adapter are those of the embedded engine, the cache
    is forgotten, and a running turn goes on under the new adapter."""
    model, tok = model_of("tags"), tokenizer_of("tags")
    add_adapters(model, LoraConfig(rank=4), seed=0)
    own = await asyncio.to_thread(start, "tags", tmp_path / "model", lora_arguments(4))
    try:
        await asyncio.to_thread(answers, own)
        options: dict[str, Any] = {"context": LONG, "local": {own.url: own}, "weight_sync": "adapter"}
        engine = VllmEngine(model, tok, [Server(own.url)], **options)
        ours = TransformersEngine(model, tok, slots=4, context=LONG)
        for version in range(3):
            await engine.sync(None, version)
            await ours.sync(None, version)
            assert engine.largest_gap <= 1e-4
            said = []
            for each in (engine, ours):
                session = await each.open(encode(tok, PROMPT * 5), seed=1)
                for _ in range(2):
                    said.append(await session.generate(Sampling(40, temperature=0, min_tokens=20)))
                    await session.append(encode(tok, RESULT))
            for a, b in ((said[0], said[2]), (said[1], said[3])):
                assert a.ids == b.ids and a.versions == b.versions == ((0, version),)
                assert max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True)) <= 1e-4
            with torch.no_grad():
                for layer in adapters(model).values():
                    layer.lora_B.add_(0.1 * torch.randn_like(layer.lora_B))
        assert len({c.ids for c in (said[0], said[1])}) == 2
        whole = Sampling(400, min_tokens=400)
        turn, version = await amid_update(engine, encode(tok, PROMPT), whole, partial(engine.sync, None), first=9)
        assert [v for _, v in turn.versions] in ([2, 9], [version - 1, version])
        assert own._process is not None  # a server that was lost starts from the base and gets the newest adapter
        os.killpg(own._process.pid, signal.SIGKILL)
        with pytest.raises(EngineError):
            await session_turn(engine, encode(tok, PROMPT))
        assert (await session_turn(engine, encode(tok, PROMPT), 5)).versions == ((0, version),)
        assert engine.largest_gap <= 1e-4
        await ours.close()
        await engine.close()
    finally:
        await asyncio.to_thread(own.remove)


async def session_turn(engine: VllmEngine, prompt: list[int], tokens: int = 400) -> Any:
    """One turn of a new trajectory."""
    session = await engine.open(prompt, seed=1)
    return await session.generate(Sampling(tokens, min_tokens=tokens))


@pytest.mark.parametrize("more", [[], ["model.lora.rank=4", "learner.lr=1e-2"]], ids=["whole", "adapters"])
async def test_a_recipe_trains_with_a_server_of_its_own(more: list[str], tmp_path: Path) -> None:
    if python() is None:
        pytest.skip("no interpreter with vLLM: `make test-vllm` makes one, or set RETOOL_VLLM_PYTHON")
    overrides = ["engine.kind=vllm", "deterministic=false", "steps=2", f"out={tmp_path / 'run'}"]
    overrides += ["model.tiny.hidden=64", "model.tiny.heads=2", "learner.threads=1", f"engine.python={python()}"]
    recipe = load_recipe("recipes/tiny.yaml", [*overrides, *more])
    result = await train(recipe)
    assert len(result.metrics) == 2
    for step, m in enumerate(result.metrics):
        assert m["version"] >= step and m["count/trajectories"] == 16 * (step + 1)
        assert m.get("count/infra_failures", 0) == 0 and m.get("count/stale_turns", 0) == 0
        assert m["max_logprob_gap"] <= 1e-4 and m["grad_norm/policy"] > 0
