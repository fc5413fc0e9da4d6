"""The client of vLLM without vLLM: shapes it must understand, where turns end, which server a trajectory goes to, what
happens when servers fail. The same engine over real servers: test_vllm_engine.py."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from retool.config import EngineConfig, LoraConfig
from retool.engines.base import EngineError, ForkProbe, Sampling
from retool.engines.text import Pieces
from retool.engines.vllm_adapter import Chunk, Server, ServerLost, ServerRefused, parse_event, request_body
from retool.engines.vllm_engine import ProbeMismatch, VllmEngine
from retool.engines.vllm_open import check_heads, sleeps
from retool.engines.vllm_server import arguments, find_python, write_plugin
from retool.engines.vllm_turn import Replica, Turn, new_thread
from retool.errors import UserError
from retool.lora import adapters, add_adapters
from retool.recipe import default_recipe
from tests.engines.contract import WeightsContract
from tests.engines.fake_vllm import FakeVllm
from tests.engines.speakers import PROMPT, RESULT, STOP, TURN, bpe_tokenizer, encode, speaker, tag_tokenizer

TOK = tag_tokenizer()


def fakes(kind: str, n: int = 1, **options: Any) -> tuple[VllmEngine, list[FakeVllm]]:
    """An engine over n servers that hold the same model."""
    made = [FakeVllm(speaker(kind), **options) for _ in range(n)]
    servers = [Server(f"http://vllm-{i}", transport=f) for i, f in enumerate(made)]
    tokenizer = bpe_tokenizer() if kind == "bpe" else TOK
    return VllmEngine(speaker(kind), tokenizer, servers, context=128, start_s=5.0), made


class TestClient(WeightsContract):
    """Everything that does not need the bans, which a server does."""

    test_banned_strings_never_appear_and_logprobs_are_renormalised = None  # type: ignore[assignment]

    def tokenizer(self, kind: str) -> Any:
        return bpe_tokenizer() if kind == "bpe" else TOK

    def make(self, kind: str, slots: int = 8, **options: Any) -> VllmEngine:
        return fakes(kind)[0]

    def model(self, engine: VllmEngine) -> Any:
        return engine._model


# -- shapes ----------------------------------------------------------------------------------------------------------

RECORDED = (
    'data: {"id":"cmpl-bc33","object":"text_completion","created":1795277218,"model":"policy","choices":[{"index":0,'
    '"text":"~","logprobs":{"text_offset":[0],"token_logprobs":[-5.155263900756836],"tokens":["~"],"top_logprobs":'
    '[{"~":-5.155263900756836}]},"finish_reason":null,"stop_reason":null,"prompt_token_ids":[10,11],"token_ids":[98]}]}'
)


def test_a_recorded_event_is_understood() -> None:
    assert parse_event(RECORDED) == Chunk((98,), (-5.155263900756836,), None)
    ended = RECORDED.replace('"finish_reason":null', '"finish_reason":"length"')
    assert parse_event(ended) == Chunk((98,), (-5.155263900756836,), "length")


@pytest.mark.parametrize("line", ["", ": ping", "data: [DONE]", 'data: {"choices":[],"usage":{"prompt_tokens":5}}'])
def test_lines_without_tokens_are_none(line: str) -> None:
    assert parse_event(line) is None


@pytest.mark.parametrize(
    ("line", "error", "match"),
    [
        ('data: {"error": {"message": "EngineCore died", "code": 500}}', ServerLost, "EngineCore died"),
        ('data: {"choices": [{"text": "a"}]}', ServerLost, "does not know"),
        ("data: {not json", ServerLost, "does not know"),
        (RECORDED.replace("[98]", "[98, 99]"), ServerLost, "2 ids with 1"),
        (RECORDED.replace("-5.155263900756836", "-9999.0"), ServerRefused, "-9999"),
        (RECORDED.replace("-5.155263900756836", "NaN"), ServerRefused, "nan"),
    ],
)
def test_what_is_not_a_token_is_an_error(line: str, error: type[EngineError], match: str) -> None:
    with pytest.raises(error, match=match):
        parse_event(line)


def test_a_request_says_everything_and_leaves_nothing_to_the_servers_defaults() -> None:
    sampling = Sampling(9, 0.7, 0.9, 20, stop=(STOP,), banned=("<code>",), min_tokens=5)
    body = request_body([1, 2], sampling, budget=7, seed=4, eos=frozenset({3}), tail=[8], sampled=2, salt="v1")
    assert (body["temperature"], body["top_p"], body["top_k"], body["min_p"]) == (0.7, 0.9, 20, 0.0)
    assert (body["max_tokens"], body["seed"], body["cache_salt"], body["stop_token_ids"]) == (7, 4, "v1", [3])
    extra = body["vllm_xargs"]
    assert json.loads(extra["retool_banned"]) == ["<code>"] and json.loads(extra["retool_early"]) == [STOP]
    assert extra["retool_min_tokens"] == 3 and json.loads(extra["retool_tail"]) == [8]
    greedy = request_body([1], Sampling(1, 0, 0.5, 3), budget=1, seed=0, eos=frozenset())
    assert (greedy["top_p"], greedy["top_k"]) == (1.0, 0) and "vllm_xargs" not in greedy


@pytest.mark.parametrize("sampling", [Sampling(1, 0.001), Sampling(1, probe=ForkProbe(1.0, 0.5))])
def test_what_vllm_cannot_do_is_refused(sampling: Sampling) -> None:
    with pytest.raises(ServerRefused, match="vLLM"):
        request_body([1], sampling, budget=1, seed=0, eos=frozenset())


# -- where a turn ends -----------------------------------------------------------------------------------------------


def turn_of(tokenizer: Any, sampling: Sampling) -> Turn:
    replica = Replica(Server("http://nobody", transport=FakeVllm(speaker("tags"))))
    thread = new_thread(replica, 0, [5], Pieces(tokenizer, len(tokenizer)))
    return Turn.new(thread, sampling, sampling.max_tokens, frozenset({tokenizer.eos_token_id}))


def pushed(turn: Turn, ids: list[int]) -> bool:
    return turn.push(Chunk(tuple(ids), (-0.5,) * len(ids)))


def test_what_comes_behind_the_stop_string_is_thrown_away() -> None:
    tok = bpe_tokenizer()
    ids = encode(tok, TURN)
    turn = turn_of(tok, Sampling(99, stop=(STOP,)))
    assert pushed(turn, [*ids, 7, 8, 9])  # the last token carries more than the stop string and is kept whole
    assert (turn.finish, turn.stop, turn.ids, len(turn.logprobs)) == ("stop", STOP, ids, len(ids))


def test_a_stop_string_of_half_characters_ends_with_its_last_piece() -> None:
    tok = bpe_tokenizer()
    ids = encode(tok, "aé→b")
    turn = turn_of(tok, Sampling(99, stop=("→",)))
    assert len(encode(tok, "→")) == 3 and pushed(turn, ids)
    assert tok.decode(turn.ids) == "aé→"


def test_the_end_of_the_text_and_the_budget() -> None:
    turn = turn_of(TOK, Sampling(3))
    assert not pushed(turn, encode(TOK, "ab"))
    assert pushed(turn, [TOK.eos_token_id, 9]) and turn.finish == "eos" and turn.ids[-1] == TOK.eos_token_id
    turn = turn_of(TOK, Sampling(3))
    assert pushed(turn, encode(TOK, "abcd")) and turn.finish == "length" and len(turn.ids) == 3


def test_a_banned_string_that_came_through_is_an_error() -> None:
    with pytest.raises(EngineError, match="banned"):
        pushed(turn_of(TOK, Sampling(9, banned=("ab",))), encode(TOK, "xab"))


# -- servers ---------------------------------------------------------------------------------------------------------


async def test_trajectories_go_to_the_least_loaded_server_and_stay_there() -> None:
    engine, servers = fakes("tags", 3)
    sessions = [await engine.open(encode(TOK, PROMPT), seed=i) for i in range(6)]
    assert [s.url[-1] for s in sessions] == ["0", "1", "2"] * 2
    await sessions[1].close()
    await sessions[4].close()
    assert (await engine.open(encode(TOK, PROMPT), seed=9)).url.endswith("1")
    for s in servers:
        s.bodies.clear()
    for _ in range(2):
        await sessions[2].generate(Sampling(3))
        await sessions[2].append(encode(TOK, RESULT))
    assert [len(s.bodies) for s in servers] == [0, 0, 2]
    (branch,) = await sessions[2].fork(1)
    assert branch.url == sessions[2].url
    await engine.close()


async def test_a_lost_server_is_left_and_comes_back_with_the_newest_weights() -> None:
    engine, (a, b) = fakes("tags", 2, slow=0.001)
    first, second = [await engine.open(encode(TOK, PROMPT), seed=i) for i in range(2)]
    a.down = True
    with pytest.raises(ServerLost):
        await first.generate(Sampling(20, min_tokens=20))
    assert (await second.generate(Sampling(5))).finish == "length"
    await first.close()
    assert (await engine.open(encode(TOK, PROMPT), seed=0)).url == second.url
    with torch.no_grad():
        engine._model.lm_head.weight.mul_(1.1)
    await engine.sync(None, 1)
    assert a.tag != b.tag
    a.restart()
    a.down = False
    while a.tag != b.tag:  # noqa: ASYNC110 (it comes back by itself)
        await asyncio.sleep(0.01)
    assert torch.equal(a.model.lm_head.weight, engine._model.lm_head.weight)
    assert engine.stats()["lost"] >= 1
    await engine.close()


async def test_a_server_that_was_started_anew_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retool.engines.vllm_engine._FRESH_S", -1.0)
    engine, (server,) = fakes("tags")
    session = await engine.open(encode(TOK, PROMPT), seed=0)
    await session.generate(Sampling(3))
    server.restart()
    with pytest.raises(ServerLost, match="started anew"):
        await session.generate(Sampling(3))
    again = await engine.open(session.ids, seed=0)
    assert server.tag == engine._weights.tag and (await again.generate(Sampling(3))).ids
    await engine.close()


async def test_a_server_that_is_lost_again_is_looked_for_again() -> None:
    engine, (server,) = fakes("tags")
    for _ in range(3):
        session = await engine.open(encode(TOK, PROMPT), seed=0)
        while engine._reviving is not None and not engine._reviving.done():  # noqa: ASYNC110 (it found it)
            await asyncio.sleep(0.01)
        server.down = True
        with pytest.raises(ServerLost):
            await session.generate(Sampling(3))
        server.restart()
        server.down = False
    assert (await engine.open(encode(TOK, PROMPT), seed=0)).ids
    await engine.close()


async def test_no_server_at_all_is_an_engine_error_in_the_end() -> None:
    engine, (server,) = fakes("tags")
    engine._start_s = 0.3
    session = await engine.open(encode(TOK, PROMPT), seed=0)
    server.down = True
    with pytest.raises(ServerLost):
        await session.generate(Sampling(3))
    with pytest.raises(EngineError, match=r"no vLLM server answers: http://vllm-0: .*connection attempts failed"):
        await engine.open(encode(TOK, PROMPT), seed=0)
    await engine.close()


async def test_a_server_that_keeps_old_weights_stops_the_run() -> None:
    engine, (server,) = fakes("tags")
    await engine.sync(None, 0)
    server.deaf = True
    with torch.no_grad():
        engine._model.lm_head.weight.mul_(1.2)
    with pytest.raises(ProbeMismatch, match=r"version 1.*probe_tolerance"):
        await engine.sync(None, 1)
    await engine.close()


@pytest.mark.parametrize("how", ["file", "adapter"])
async def test_a_server_sleeps_while_the_learner_works_and_wakes_for_new_weights(how: Any) -> None:
    server = FakeVllm(adapted() if how == "adapter" else speaker("tags"))
    model = adapted() if how == "adapter" else speaker("tags")
    servers = [Server("http://vllm", transport=server)]
    engine = VllmEngine(model, TOK, servers, context=128, weight_sync=how, sleep=True)
    session = await engine.open(encode(TOK, PROMPT), seed=0)
    await session.generate(Sampling(3))
    server.calls.clear()
    await engine.rest()
    await engine.rest()
    assert server.calls == ["/sleep"] and server.sleeping == ("1" if how == "adapter" else "2")
    turn = asyncio.create_task(session.generate(Sampling(3)))  # waits for the update
    await asyncio.sleep(0.05)
    assert server.calls == ["/sleep"] and not turn.done()
    await engine.sync(None, 1)
    assert (await turn).versions == ((0, 1),)
    steps = [c for c in server.calls if c != "/v1/completions"]
    loads = {
        "file": ["/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update"],
        "adapter": ["/weight_info", "/v1/load_lora_adapter", "/update_weight_version", "/v1/unload_lora_adapter"],
    }
    assert steps == ["/sleep", "/wake_up?weights", *loads[how], "/reset_prefix_cache", "/wake_up?kv_cache"]
    assert server.sleeping is None and engine.largest_gap <= 1e-4
    await engine.sync(None, 2)  # without a rest before it
    assert server.calls.count("/sleep") == 1 and "/pause" in server.calls
    await engine.close()


async def test_engines_that_do_not_sleep_do_not_rest() -> None:
    engine, (server,) = fakes("tags")
    await engine.sync(None, 0)
    await engine.rest()
    assert "/sleep" not in server.calls
    await engine.close()


def test_sleep_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not sleeps(EngineConfig(kind="vllm"))
    with pytest.raises(UserError, match=r"engine\.sleep: there is no GPU here"):
        sleeps(EngineConfig(kind="vllm", sleep=True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert sleeps(EngineConfig(kind="vllm")) and not sleeps(EngineConfig(kind="vllm", sleep=False))
    theirs = {"kind": "vllm", "urls": ("http://a:1",), "share": "/x"}
    assert not sleeps(EngineConfig(**theirs)) and sleeps(EngineConfig(**theirs, sleep=True))


async def test_a_server_that_cannot_load_the_first_weights_has_another_model() -> None:
    engine, (server,) = fakes("tags")
    server.broken = True
    with pytest.raises(UserError, match=r"did not take this run's weights.*same model.*answered 500: Worker failed"):
        await engine.sync(None, 0)
    assert not server.paused
    await engine.close()


def held(engine: VllmEngine) -> list[Path]:
    """What lies in the shared folder."""
    return list(engine._weights._share.glob("*"))


async def test_an_update_pauses_loads_drops_the_cache_and_resumes() -> None:
    engine, (server,) = fakes("tags")
    await engine.sync(None, 0)
    want = ["/pause", "/init_weight_transfer_engine", "/start_weight_update", "/update_weights"]
    want += ["/finish_weight_update", "/reset_prefix_cache", "/resume"]
    at = server.calls.index("/pause")
    assert server.calls[at : at + 7] == want and set(server.calls[at + 7 :]) == {"/v1/completions"}
    await engine.sync(None, 1)
    assert len(held(engine)) == 1  # only the newest weights are kept
    await engine.close()
    assert not held(engine) and server.left_open == 0


def adapted(seed: int = 0) -> Any:
    """The model with adapters that change what it says."""
    model = speaker("tags")
    add_adapters(model, LoraConfig(rank=4), seed)
    return model


async def test_an_adapter_goes_over_alone_and_the_one_before_is_forgotten() -> None:
    server = FakeVllm(adapted())
    model = adapted(seed=1)
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_B.normal_(std=0.3)
    engine = VllmEngine(
        model, TOK, [Server("http://vllm", transport=server)], context=128, start_s=5.0, weight_sync="adapter"
    )
    session = await engine.open(encode(TOK, PROMPT), seed=0)
    await session.generate(Sampling(3))
    assert "/update_weights" not in server.calls and len(server.served) == 1
    (folder,) = held(engine)
    assert {p.name for p in folder.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_B.mul_(0.5)
    await engine.sync(None, 1)
    assert server.served == [f"policy-{engine._weights.tag}"] and server.tag == engine._weights.tag
    assert (await session.generate(Sampling(3))).versions == ((0, 1),)
    assert server.bodies[-1]["model"] == server.served[0] and engine.largest_gap <= 1e-4
    await engine.close()


async def test_a_server_without_room_for_adapters_is_refused() -> None:
    server = Server("http://vllm", transport=FakeVllm(speaker("tags")))
    engine = VllmEngine(adapted(), TOK, [server], context=128, weight_sync="adapter", start_s=0.3)
    with pytest.raises(EngineError, match=r"--enable-lora.*engine\.weight_sync=file"):
        await engine.sync(None, 0)
    await engine.close()


async def test_whole_weights_have_their_adapters_merged() -> None:
    fake, model = FakeVllm(speaker("tags")), adapted()
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_B.normal_(std=0.3)
    engine = VllmEngine(model, TOK, [Server("http://vllm", transport=fake)], context=128)
    await engine.sync(None, 0)
    assert engine.largest_gap <= 1e-4
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(fake.model.state_dict()[name], fake.first[name])
    await engine.close()


@pytest.mark.parametrize(
    ("options", "match"),
    [({"version": "0.11.2"}, "vLLM 0.11.2; 0.32 or newer"), ({"dev": False}, "VLLM_SERVER_DEV_MODE=1")],
)
async def test_a_server_that_will_not_do_is_refused(options: dict[str, Any], match: str) -> None:
    engine, _ = fakes("tags", **options)
    with pytest.raises(ServerRefused, match=match):
        await engine.sync(None, 0)
    await engine.close()


# -- recipes, the server's command line ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["engine.urls=[http://a:1]"], "needs engine.kind vllm"),
        (["engine.kind=vllm", "engine.urls=[http://a:1]"], "needs engine.share"),
        (["engine.kind=vllm", "engine.urls=[a:1]", "engine.share=/x"], "write http://HOST:PORT"),
        (["engine.kind=vllm", "deterministic=true"], "needs engine.kind transformers"),
    ],
)
def test_recipes_that_cannot_work_are_refused(overrides: list[str], match: str) -> None:
    with pytest.raises(UserError, match=match):
        default_recipe(overrides)


def test_heads_that_vllm_does_not_know_on_cpu_are_named() -> None:
    with pytest.raises(UserError, match=r"this model has 16.*model\.tiny\.head_dim=32"):
        check_heads(speaker("tags"))
    check_heads(speaker("tags", head_dim=32))


def test_an_interpreter_without_vllm_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RETOOL_VLLM_PYTHON", raising=False)
    with pytest.raises(UserError, match=r"no vLLM in /nowhere/python.*make vllm-env"):
        find_python("/nowhere/python")


def test_the_servers_command_line(tmp_path: Path) -> None:
    made = arguments("m", where=["--uds", "s"], dtype="bfloat16", context=99, cpu=True, more=["--seed", "1"])
    assert made[made.index("--logprobs-mode") + 1] == "processed_logprobs"
    assert made[made.index("--max-model-len") + 1] == "99" and made[-2:] == ["--seed", "1"]
    names = {p.name for p in (write_plugin(tmp_path) / "retool_vllm").iterdir()}
    assert names == {"__init__.py", "plugin.py", "text.py", "launch.py", "weight_group.py", "weight_wire.py"}
