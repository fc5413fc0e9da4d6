"""The embedded engine's parts: which models it takes, failures of a pass, eviction, sampling, banned tokens."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from retool.engines.base import EngineError, Sampling
from retool.engines.forward import ModelNotSupported
from retool.engines.sampler import draw, mix_seed, processed_logprobs, uniforms
from retool.engines.text import Bans, Pieces, Tail
from retool.engines.transformers_engine import TransformersEngine
from tests.engines.speakers import PROMPT, RESULT, bpe_tokenizer, encode, small_llama, speaker, tag_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 107,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "attn_implementation": "sdpa",
}


def test_models_whose_attention_is_not_ordinary_are_refused() -> None:
    tok = tag_tokenizer()
    window = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=16)).eval()
    with pytest.raises(ModelNotSupported, match=r"slides over 16 tokens; set engine\.context to at most 16"):
        TransformersEngine(window, tok)
    TransformersEngine(window, tok, context=16)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    dynamic = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope)).eval()
    with pytest.raises(ModelNotSupported, match="'dynamic'"):
        TransformersEngine(dynamic, tok)


class Shifted(LlamaForCausalLM):
    """Gives other logits as soon as a cache is there: no configuration could tell."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        if kwargs.get("past_key_values") is not None:
            out.logits = out.logits.roll(1, -1)
        return out


def test_a_model_that_disagrees_with_itself_is_refused() -> None:
    with pytest.raises(ModelNotSupported, match="other logits over the slot cache"):
        TransformersEngine(Shifted(LlamaConfig(**SIZES)).eval(), tag_tokenizer())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
async def test_families_of_models(kind: str, attention: str) -> None:
    tok = tag_tokenizer()
    torch.manual_seed(0)
    sizes = SIZES | {"attn_implementation": attention}
    model: Any
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    else:
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=107, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_implementation=attention)
        )
    engine = TransformersEngine(model.eval(), tok, slots=4)
    prompts = [encode(tok, "a" * n) for n in (3, 9)]
    sessions = [await engine.open(p, seed=i) for i, p in enumerate(prompts)]
    for length in (4, 7):
        said = await asyncio.gather(*(s.generate(Sampling(length, min_tokens=0)) for s in sessions))
        for s, c in zip(sessions, said):
            ids = list(s.ids)
            with torch.no_grad():
                logp = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
            start = len(ids) - len(c.ids)
            want = [float(logp[i - 1, ids[i]]) for i in range(start, len(ids))]
            assert max(abs(a - b) for a, b in zip(c.logprobs, want, strict=True)) <= 1e-4
            await s.append(encode(tok, RESULT))
    await engine.close()


def test_bad_settings_are_refused() -> None:
    model = small_llama(tag_tokenizer(), context=64)
    with pytest.raises(ValueError, match="knows only 64 positions"):
        TransformersEngine(model, tag_tokenizer(), context=65)
    with pytest.raises(ValueError, match="slots"):
        TransformersEngine(model, tag_tokenizer(), slots=0)


async def test_a_failing_pass_fails_its_turns_and_the_engine_lives_on() -> None:
    tok, model = tag_tokenizer(), speaker("tags")
    engine = TransformersEngine(model, tok, slots=4)
    sessions = [await engine.open(encode(tok, PROMPT), seed=i) for i in range(3)]

    def burn(*_: Any) -> None:
        raise RuntimeError("out of memory")

    hook = model.model.layers[1].register_forward_pre_hook(burn)
    said = await asyncio.gather(*(s.generate(Sampling(5)) for s in sessions), return_exceptions=True)
    assert all(isinstance(e, EngineError) and "out of memory" in str(e) for e in said)
    hook.remove()
    assert all(s.ids == tuple(encode(tok, PROMPT)) for s in sessions)
    greedy = [await s.generate(Sampling(5, temperature=0)) for s in sessions]
    assert len({c.ids for c in greedy}) == 1 and tok.decode(greedy[0].ids) == "Let m"
    await engine.close()


async def test_logits_that_are_no_numbers_cost_that_turn() -> None:
    tok, model = tag_tokenizer(), speaker("tags")
    engine = TransformersEngine(model, tok, slots=4)
    session = await engine.open(encode(tok, PROMPT), seed=0)
    weight = model.model.norm.weight
    good = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(math.nan)
    with pytest.raises(EngineError, match="log-prob nan") as caught:
        await session.generate(Sampling(5))
    assert not caught.value.retryable
    with torch.no_grad():
        weight.copy_(good)
    await engine.sync(None, 1)
    assert (await session.generate(Sampling(5, temperature=0))).versions == ((0, 1),)
    await engine.close()


async def test_idle_sessions_give_their_slot_only_when_nobody_could_go_on() -> None:
    tok = tag_tokenizer()
    engine = TransformersEngine(speaker("tags"), tok, slots=1)
    a, b = [await engine.open(encode(tok, PROMPT), seed=1) for _ in range(2)]
    one = await a.generate(Sampling(5, temperature=0))
    two = await b.generate(Sampling(5, temperature=0))
    more = await a.generate(Sampling(5, temperature=0))
    assert one.ids == two.ids and tok.decode([*one.ids, *more.ids]) == "Let me run"
    stats = engine.stats()
    assert stats["evicted"] == 2 and stats["replayed"] == len(encode(tok, PROMPT)) + 4
    await engine.close()


async def test_a_private_copy_does_not_follow_the_learner() -> None:
    tok, model = tag_tokenizer(), speaker("tags")
    engine = TransformersEngine(model, tok, slots=1, shared_weights=False)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    session = await engine.open(encode(tok, PROMPT), seed=1)
    assert tok.decode((await session.generate(Sampling(5, temperature=0))).ids) == "Let m"
    with pytest.raises(EngineError, match="own copy"):
        await engine.sync(None, 1)
    with pytest.raises(EngineError, match="do not fit"):
        await engine.sync({"nonsense": torch.zeros(1)}, 1)
    await engine.sync(model.state_dict(), 1)
    c = await session.generate(Sampling(5))
    assert all(abs(x + math.log(len(tok))) < 1e-4 for x in c.logprobs) and c.versions == ((0, 1),)
    await engine.close()


async def test_a_group_takes_more_columns_than_a_first_allocation() -> None:
    """Growth of the store keeps what lies in it."""
    tok = tag_tokenizer()
    model = small_llama(tok, context=512)
    engine = TransformersEngine(model, tok, slots=3)
    session = await engine.open(encode(tok, "a" * 5), seed=0)
    c = await session.generate(Sampling(300, min_tokens=300))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([session.ids])).logits[0].float()
    logits[:, tok.eos_token_id] = -torch.inf
    logp = logits.log_softmax(-1)
    want = [float(logp[4 + i, t]) for i, t in enumerate(c.ids)]
    assert max(abs(a - b) for a, b in zip(c.logprobs, want, strict=True)) <= 1e-4
    await engine.close()


# -- sampling ---------------------------------------------------------------------------------------------------------


def test_uniforms_are_uniform_and_keyed() -> None:
    u = uniforms(range(20_000), [7] * 20_000)
    assert u.min() >= 0 and u.max() < 1
    histogram = np.histogram(u, 20, (0, 1))[0]
    assert abs(histogram - 1000).max() < 150
    assert uniforms([3, 4], [10, 11]).tolist() == [*uniforms([3], [10]), *uniforms([4], [11])]
    assert len({*uniforms([3], [10], 0), *uniforms([3], [10], 1), *uniforms([3], [11]), *uniforms([-3], [10])}) == 4
    assert len({mix_seed(1, 2), mix_seed(2, 1), mix_seed(1, 2, 0), mix_seed(1), mix_seed(12)}) == 5
    assert 0 <= mix_seed(-1, 2**70) < 2**63


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0, 1.0]]).repeat(40_000, 1)
    n = len(logits)
    logp = processed_logprobs(logits, torch.full((n,), 0.8), [0] * n, [1.0] * n)
    tokens, values = draw(logp, uniforms([5] * n, range(n)), [False] * n)
    want = (logits[0] / 0.8).softmax(-1)
    got = torch.bincount(torch.tensor(tokens), minlength=4) / n
    assert float((got - want).abs().max()) < 0.01
    assert all(abs(v - float(want[t].log())) < 1e-5 for t, v in zip(tokens[:50], values[:50]))


@given(
    st.lists(st.floats(-20, 20), min_size=2, max_size=12), st.integers(0, 14), st.floats(0.05, 1.0), st.floats(0.1, 3)
)
@settings(max_examples=60, deadline=None)
def test_truncation_keeps_the_best_and_renormalises(row: list[float], k: int, p: float, t: float) -> None:
    logits = torch.tensor([row])
    logp = processed_logprobs(logits, torch.tensor([t]), [k], [p])[0]
    full = (logits[0] / t).softmax(-1)
    kept = torch.isfinite(logp)
    assert kept.any() and abs(float(logp.exp().sum()) - 1) < 1e-4
    if 0 < k < len(row):
        assert int(kept.sum()) <= k
    if (~kept).any():
        assert float(full[kept].min()) >= float(full[~kept].max()) - 1e-6
    for u in (0.0, 0.5, 1 - 2**-53):
        assert kept[draw(logp[None], np.array([u]), [False])[0][0]]


# -- strings ----------------------------------------------------------------------------------------------------------

PIECES = Pieces(bpe_tokenizer(), len(bpe_tokenizer()))
TOKENS = st.lists(
    st.sampled_from(range(4, len(bpe_tokenizer()))) | st.sampled_from(encode(bpe_tokenizer(), "</code>\nd>e"))
)


@example([262, 98, 260], ("e>", "ode>\nx"))  # half a character between the halves of a string
@given(TOKENS, st.sampled_from([("</code>",), ("e>", "ode>\nx"), ("aa", "a\n"), ("\u00e9",)]))
@settings(max_examples=150, deadline=None)
def test_stops_are_found_at_the_token_that_completes_them(ids: list[int], stops: tuple[str, ...]) -> None:
    tok = bpe_tokenizer()
    tail, keep = Tail(PIECES), max(map(len, stops))
    for n, token in enumerate(ids, start=1):
        hit = tail.push(token, stops, keep)
        before, now = tok.decode(ids[: n - 1]), tok.decode(ids[:n])
        completed = {s for s in stops if _count(now, s) > _count(before, s)}
        assert (hit in completed) if completed else hit is None


def _count(text: str, s: str) -> int:
    """Occurrences, overlapping ones too."""
    return sum(text.startswith(s, i) for i in range(len(text)))


@given(TOKENS, st.sampled_from([("</code>",), ("e>", "ode>\nx"), ("aa", "ab")]))
@settings(max_examples=60, deadline=None)
def test_bans_mask_exactly_the_tokens_that_would_complete_one(ids: list[int], banned: tuple[str, ...]) -> None:
    tok = bpe_tokenizer()
    ids = [i for i in ids if not PIECES.partial(i)]
    bans = Bans(PIECES, banned, frozenset(), torch.device("cpu"))
    tail = Tail(PIECES)
    for token in ids:
        tail.push(token, banned, bans.keep)
    text = tok.decode(ids)
    mask = bans.mask(tail.text).tolist()
    for token in range(len(tok)):
        if not PIECES.partial(token):
            now = text + PIECES[token]
            assert mask[token] == any(_count(now, b) > _count(text, b) for b in banned), (text, PIECES[token])


async def test_bans_hold_where_characters_are_spread_over_tokens() -> None:
    """No mask foresees these: the token is drawn, found to complete the string, and drawn again."""
    tok = bpe_tokenizer()
    model = small_llama(tok)
    alphabet = [i for i in range(len(tok)) if PIECES.partial(i)]
    bias = torch.full((len(tok),), -8.0)
    bias[alphabet] = 0.0
    bias[encode(tok, "\u00e9")[0]] = 4.0  # the first byte of every banned character

    def push(_module: Any, _args: Any, out: Any) -> None:
        out.logits = out.logits + bias

    model.register_forward_hook(push)
    engine = TransformersEngine(model, tok, slots=8)
    banned = tuple(bytes([0xC3, b]).decode() for b in range(0x80, 0xC0))

    async def text(seed: int, banned: tuple[str, ...]) -> str:
        session = await engine.open(encode(tok, PROMPT), seed)
        c = await session.generate(Sampling(60, min_tokens=60, banned=banned))
        assert len(c.ids) == 60
        await session.close()
        return str(tok.decode(c.ids))

    free = await asyncio.gather(*(text(i, ()) for i in range(8)))
    assert sum(any(b in t for b in banned) for t in free) == 8
    held = await asyncio.gather(*(text(i, banned) for i in range(8)))
    assert not any(b in t for t in held for b in banned)
    await engine.close()
