"""The client of vLLM with weights over a process group, without vLLM: the stand-in is the worker at the other end. Over
real servers: test_vllm_sync.py."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file

from retool.config import EngineConfig, LoraConfig
from retool.engines import vllm_group
from retool.engines.base import EngineError, Sampling
from retool.engines.vllm_adapter import Server, ServerLost, ServerRefused
from retool.engines.vllm_engine import ProbeMismatch, VllmEngine
from retool.engines.vllm_group import WeightGroups, in_thread, outgoing, split_host
from retool.engines.vllm_open import how_of, open_vllm
from retool.engines.vllm_weights import save_merged
from retool.engines.weight_wire import WireError
from retool.errors import UserError
from retool.lora import adapters, add_adapters
from retool.recipe import default_recipe
from tests.engines.contract import WeightsContract
from tests.engines.fake_vllm import FakeVllm
from tests.engines.speakers import PROMPT, bpe_tokenizer, encode, speaker, tag_tokenizer

TOK = tag_tokenizer()


def fakes(kind: str = "tags", n: int = 1, model: Any = None, **options: Any) -> tuple[VllmEngine, list[FakeVllm]]:
    """An engine over n servers, each a worker of a group of its own."""
    made = [FakeVllm(speaker(kind)) for _ in range(n)]
    servers = [Server(f"http://127.0.0.1:{i + 1}", transport=f) for i, f in enumerate(made)]
    tokenizer = bpe_tokenizer() if kind == "bpe" else TOK
    given = {"context": 128, "start_s": 5.0, "weight_sync": "gloo", **options}
    return VllmEngine(model or speaker(kind), tokenizer, servers, **given), made


@asynccontextmanager
async def over(*args: Any, **options: Any) -> AsyncIterator[tuple[VllmEngine, list[FakeVllm]]]:
    engine, made = fakes(*args, **options)
    try:
        yield engine, made
    finally:
        await engine.close()
        for fake in made:
            fake.stuck = False
            fake.leave()


class TestGroup(WeightsContract):
    """Everything that does not need the bans, which a server does."""

    test_banned_strings_never_appear_and_logprobs_are_renormalised = None  # type: ignore[assignment]

    def tokenizer(self, kind: str) -> Any:
        return bpe_tokenizer() if kind == "bpe" else TOK

    def make(self, kind: str, slots: int = 8, **options: Any) -> VllmEngine:
        return fakes(kind)[0]

    def model(self, engine: VllmEngine) -> Any:
        return engine._model


def changed(engine: VllmEngine, by: float = 1.1) -> None:
    with torch.no_grad():
        engine._model.lm_head.weight.mul_(by)


async def says(engine: VllmEngine) -> Any:
    session = await engine.open(encode(TOK, PROMPT), seed=0)
    said = await session.generate(Sampling(5))
    await session.close()
    return said


async def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


def trained(**options: Any) -> Any:
    """A model with adapters that change what it says."""
    model = speaker("tags", **options)
    add_adapters(model, LoraConfig(rank=4), seed=0)
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_B.normal_(std=0.3)
    return model


# -- what is sent ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_what_is_sent_is_what_a_file_holds(tied: bool, lora: bool, tmp_path: Any) -> None:
    model = trained(tied=tied) if lora else speaker("tags", tied=tied)
    save_merged(model, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    written, sent = load_file(file), outgoing(model)
    assert set(written) == set(sent) and ("lm_head.weight" in sent) is not tied
    assert all(torch.equal(written[name], sent[name]) for name in written)


async def test_one_group_for_every_server_and_one_joining_for_all_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_group, "BUCKET", 4096)  # many buckets
    async with over(n=2) as (engine, servers):
        for version in range(3):
            await engine.sync(None, version)
            changed(engine)
        assert [s.joined for s in servers] == [1, 1] and {s.tag for s in servers} == {engine._weights.tag}
        keys = {s.receiver.invitation.key for s in servers if s.receiver is not None}
        assert len(keys) == 2 and servers[0].buckets == servers[1].buckets > 3 * 5
        steps = [c for c in servers[0].calls if c not in ("/v1/completions", "/update_weights")]
        around = ["/start_weight_update", "/finish_weight_update", "/reset_prefix_cache", "/resume"]
        assert steps[-6:] == ["/pause", "/weight_info", *around]
        assert engine.largest_gap <= 1e-4


async def test_adapters_are_merged_on_the_way() -> None:
    async with over(model=trained()) as (engine, (server,)):
        await engine.sync(None, 0)
        name = "model.layers.0.self_attn.q_proj.weight"
        assert engine.largest_gap <= 1e-4 and not torch.equal(server.model.state_dict()[name], server.first[name])


# -- servers that fail -----------------------------------------------------------------------------------------------


async def test_a_server_that_dies_between_two_updates_takes_no_other_along_and_gets_the_newest_weights() -> None:
    async with over(n=2) as (engine, (a, b)):
        await engine.sync(None, 0)
        a.restart()
        a.down = True
        changed(engine)
        await engine.sync(None, 1)
        assert [r.good for r in engine._replicas] == [False, True] and (await says(engine)).versions == ((0, 1),)
        a.down = False
        await until(lambda: all(r.good for r in engine._replicas))
        assert (a.joined, b.joined) == (2, 1) and a.tag == b.tag == engine._weights.tag
        assert torch.equal(a.model.lm_head.weight, engine._model.lm_head.weight)
        changed(engine)
        await engine.sync(None, 2)
        assert (a.joined, b.joined) == (2, 1) and engine.largest_gap <= 1e-4


async def test_a_server_that_was_started_anew_behind_our_back_gets_a_new_group() -> None:
    async with over() as (engine, (server,)):
        await engine.sync(None, 0)
        server.restart()
        changed(engine)
        await engine.sync(None, 1)
        assert server.joined == 2 and server.tag == engine._weights.tag and engine.largest_gap <= 1e-4


@pytest.mark.parametrize("how", ["vanishes", "fails", "stands still"])
async def test_a_server_that_fails_in_the_middle_of_an_update_is_lost_and_comes_back(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_group, "BUCKET", 4096)
    monkeypatch.setattr(vllm_group, "_GRACE_S", 0.2)
    async with over(sync_s=0.5 if how == "stands still" else 60.0) as (engine, (server,)):
        await engine.sync(None, 0)
        receiver = server.receiver
        assert receiver is not None
        receive, released, left = receiver.receive, threading.Event(), 2

        def interrupted(told: Any) -> Any:
            nonlocal left
            left -= 1
            if left >= 0:
                return receive(told)
            if how == "fails":
                raise ValueError("out of memory")
            if how == "vanishes":
                server.down = True
                receiver.close()
                raise httpx.ReadError("connection lost")
            released.wait(60)
            raise WireError("too late")

        monkeypatch.setattr(receiver, "receive", interrupted)
        changed(engine)
        await engine.sync(None, 1)
        (replica,) = engine._replicas
        assert not replica.good and isinstance(replica.lost, ServerLost) and server.tag != engine._weights.tag
        released.set()
        server.down = False
        assert (await says(engine)).versions == ((0, 1),)  # it was looked at again, over a new group
        assert server.joined == 2 and server.tag == engine._weights.tag
        changed(engine)
        await engine.sync(None, 2)
        assert server.joined == 2 and engine.largest_gap <= 1e-4


async def test_an_update_that_was_left_open_is_ended_first() -> None:
    async with over() as (engine, (server,)):
        server.updating = True  # of a learner that was killed
        await engine.sync(None, 0)
        at = server.calls.index("/start_weight_update")
        assert server.calls[at : at + 3] == ["/start_weight_update", "/finish_weight_update", "/start_weight_update"]
        assert server.tag == engine._weights.tag


async def test_a_server_of_another_run_is_refused_until_that_one_ends() -> None:
    async with over() as (engine, (server,)):
        await engine.sync(None, 0)
        other = VllmEngine(
            speaker("tags"), TOK, [Server("http://127.0.0.1:1", transport=server)], context=128, weight_sync="gloo"
        )
        with pytest.raises(ServerRefused, match=r"cannot form a group .*another run, which is still there"):
            await other.sync(None, 0)
        await engine.close()
        await other.sync(None, 0)
        assert server.tag == other._weights.tag and other.largest_gap <= 1e-4
        await other.close()


async def test_a_server_that_cannot_reach_the_learner_is_told_at_the_first_contact() -> None:
    async with over(sync_host="192.0.2.1") as (engine, _):
        with pytest.raises(EngineError, match=r"cannot form a group .*weight_sync=gloo: cannot listen at 192\.0\.2\.1"):
            await engine.sync(None, 0)


async def test_a_server_that_keeps_old_weights_stops_the_run() -> None:
    async with over() as (engine, (server,)):
        await engine.sync(None, 0)
        server.deaf = True
        changed(engine, 1.3)
        with pytest.raises(ProbeMismatch, match="weight_sync is gloo"):
            await engine.sync(None, 1)


async def test_a_lost_server_waits_while_the_learner_has_weights_of_no_version() -> None:
    async with over(n=2) as (engine, (a, _)):
        await engine.sync(None, 0)
        a.restart()
        a.down = True
        with pytest.raises(EngineError):
            await asyncio.gather(*(says(engine) for _ in range(2)))
        changed(engine)  # an optimiser's step, and no update yet
        a.down = False
        asked = len(a.calls)
        await says(engine)
        await until(lambda: a.calls[asked:].count("/version") >= 3)  # somebody looks whether it is there
        assert "/update_weights" not in a.calls[asked:] and not engine._weights.current
        await engine.sync(None, 1)
        await until(lambda: all(r.good for r in engine._replicas))
        assert a.tag == engine._weights.tag and engine.largest_gap <= 1e-4


async def test_weights_that_change_while_they_are_sent_are_not_taken_for_a_version() -> None:
    async with over() as (engine, (server,)):
        await engine.sync(None, 0)
        assert server.receiver is not None
        receive = server.receiver.receive

        def meanwhile(told: Any) -> Any:
            changed(engine)
            return receive(told)

        server.receiver.receive = meanwhile  # type: ignore[method-assign]
        tag = server.tag
        await engine.sync(None, 1)
        (replica,) = engine._replicas
        assert not replica.good and "changed while they were sent" in replica.why and server.tag == tag


async def test_a_cancelled_update_leaves_the_group_and_the_next_one_works() -> None:
    async with over() as (engine, (server,)):
        await engine.sync(None, 0)
        server.stuck = True
        task = asyncio.create_task(engine.sync(None, 1))
        await until(lambda: "/update_weights" in server.calls[-2:])
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        server.stuck = False
        await engine.sync(None, 2)
        assert server.joined == 2 and (await says(engine)).versions == ((0, 2),)


async def test_a_thread_that_hangs_is_not_waited_for() -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(in_thread(lambda: time.sleep(1.0)), 0.01)
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda: 1 / 0)
    assert await in_thread(lambda: 7) == 7


# -- recipes ---------------------------------------------------------------------------------------------------------


def test_addresses() -> None:
    assert [split_host(t) for t in ("h", "h.x:8", "10.0.0.1:70", "[::1]", "[::1]:5")] == [
        ("h", 0),
        ("h.x", 8),
        ("10.0.0.1", 70),
        ("::1", 0),
        ("::1", 5),
    ]


@pytest.mark.parametrize("how", ["nccl", "ipc"])
async def test_what_needs_a_gpu_says_so(how: Any) -> None:
    model = speaker("tags")
    with pytest.raises(UserError, match=rf"{how} needs a learner on a CUDA device; set engine\.weight_sync=gloo"):
        how_of(EngineConfig(kind="vllm", weight_sync=how), model)
    if how == "nccl":
        config = EngineConfig(kind="vllm", weight_sync=how, urls=("http://127.0.0.1:1",))
        with pytest.raises(UserError, match="nccl needs a learner on a CUDA device"):
            await open_vllm(config, model, TOK)


def test_a_group_needs_no_shared_folder() -> None:
    for how in ("gloo", "nccl"):
        recipe = default_recipe(["engine.kind=vllm", "engine.urls=[http://a:1]", f"engine.weight_sync={how}"])
        assert recipe.engine.share is None


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["engine.sync_host=a"], "needs engine.kind vllm"),
        (["engine.kind=vllm", "engine.sync_host=a"], "gloo with it"),
        (["engine.kind=vllm", "engine.weight_sync=gloo", "engine.sync_host=http://a"], "HOST or HOST:PORT"),
        (["engine.kind=vllm", "engine.weight_sync=ipc", "engine.urls=[http://a:1]"], "started here"),
        (["engine.kind=vllm", "engine.urls=[http://a:1]"], "weight_sync gloo or nccl"),
    ],
)
def test_recipes_that_cannot_work_are_refused(overrides: list[str], match: str) -> None:
    with pytest.raises(UserError, match=match):
        default_recipe(overrides)


async def test_the_probe_and_the_options_come_from_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """From `engine.*` to the group, with a server of one's own."""
    fake = FakeVllm(speaker("tags"))
    made = Server
    monkeypatch.setattr("retool.engines.vllm_open.Server", lambda url, s: made(url, s, transport=fake))
    config = EngineConfig(
        kind="vllm", urls=("http://127.0.0.1:7",), weight_sync="gloo", sync_host="127.0.0.1", sync_s=9, context=128
    )
    engine = await open_vllm(config, speaker("tags"), TOK)
    await engine.sync(None, 4)
    assert fake.receiver is not None and isinstance(engine._weights, WeightGroups)
    assert (fake.receiver.invitation.seconds, fake.receiver.invitation.host) == (9, "127.0.0.1")
    assert engine.largest_gap <= 1e-4
    await engine.close()
