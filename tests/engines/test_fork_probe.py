"""Temperatures by position: chosen by the entropy at temperature 1, exempt in code, honest in their log-probs."""

from __future__ import annotations

import math

import numpy as np
import torch

from retool.config import TinyModelConfig
from retool.engines.base import ForkProbe, Sampling
from retool.engines.rows import Inside
from retool.engines.sampler import draw, probe_temperatures, processed_logprobs, uniforms
from retool.engines.text import Pieces
from retool.engines.transformers_engine import TransformersEngine
from retool.models import tiny_model, tiny_tokenizer

TOK = tiny_tokenizer()
TINY = TinyModelConfig(hidden=32, layers=1, heads=2, intermediate=32, context=128, init_std=0.3)


def test_temperature_follows_the_entropy_at_temperature_one() -> None:
    sure, open_ = [9.0, 0.0, 0.0, 0.0], [0.3, 0.1, 0.0, -0.1]
    logits = torch.tensor([sure, open_, open_, open_, sure])
    a = len(logits)
    code = torch.tensor([False, False, True, True, True])
    fork = torch.tensor([2.0, 2.0, 2.0, 0.5, 2.0])
    got = probe_temperatures(logits, fork, torch.full((a,), 0.7), torch.full((a,), 0.672), code)
    torch.testing.assert_close(got, torch.tensor([0.7, 2.0, 1.0, 0.5, 0.7]))
    banned = torch.tensor([[0.0, -torch.inf, -torch.inf, 0.0]])
    one = torch.ones(1)
    threshold = torch.tensor([math.log(2) - 1e-4])
    assert probe_temperatures(banned, 3 * one, one, threshold, torch.zeros(1, dtype=torch.bool)).item() == 3.0


def test_what_is_sampled_has_the_reported_distribution() -> None:
    """20 000 draws at one fork and one sure position: frequencies are exp of the reported log-probs."""
    logits = torch.tensor([[1.0, 0.5, 0.0, -0.5], [6.0, 0.0, 0.0, 0.0]])
    fork, rest = torch.tensor([1.8, 1.8]), torch.tensor([0.6, 0.6])
    chosen = probe_temperatures(logits, fork, rest, torch.tensor([0.672] * 2), torch.zeros(2, dtype=torch.bool))
    torch.testing.assert_close(chosen, torch.tensor([1.8, 0.6]))
    logp = processed_logprobs(logits, chosen, [0, 0], [1.0, 1.0])
    torch.testing.assert_close(logp, torch.log_softmax(logits / chosen[:, None], -1))
    n = 20_000
    for row in range(2):
        tokens, values = draw(logp[row].expand(n, 4), uniforms(range(n), [row] * n), [False] * n)
        shares = np.bincount(tokens, minlength=4) / n
        assert np.abs(shares - logp[row].exp().numpy()).max() < 4 * 0.5 / math.sqrt(n)
        assert values[0] == logp[row, tokens[0]].item()


def test_inside_code_begins_and_ends_with_its_tags() -> None:
    inside = Inside(Pieces(TOK, len(TOK)), "<code>", ("</code>",))
    states = []
    for token in TOK.encode("a<code>b</code>c<code>d", add_special_tokens=False):
        inside.push(token)
        states.append(inside.now)
    assert states == [False, True, True, False, False, True, True]


async def generate(sampling: Sampling) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    model = tiny_model(TINY, len(TOK), 1, TOK.eos_token_id, TOK.pad_token_id).eval()
    engine = TransformersEngine(model, TOK, slots=4)
    out = []
    for seed in range(4):
        session = await engine.open(TOK.encode("What is 2*3?", add_special_tokens=False), seed)
        done = await session.generate(sampling)
        out.append((done.ids, done.logprobs))
        await session.close()
    await engine.close()
    return out


async def test_the_engine_reports_what_it_sampled_from() -> None:
    """Log-probs of each token, computed again from the model and the rule."""
    limit = 3.4
    probe = ForkProbe(fork=1.6, rest=0.5, entropy=limit, opens="5", closes=("x", "7"))
    found = await generate(Sampling(100, probe=probe))
    model = tiny_model(TINY, len(TOK), 1, TOK.eos_token_id, TOK.pad_token_id).eval()
    prompt, code, end = (TOK.encode(t, add_special_tokens=False) for t in ("What is 2*3?", "5", "x7"))
    seen = {0.5: 0, 1.0: 0, 1.6: 0}
    for ids, logprobs in found:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].float()
        inside = False
        for token, logprob, z in zip(ids, logprobs, logits, strict=True):
            p = torch.softmax(z, -1)
            high = float(-(p * p.log()).sum()) > limit
            temperature = (min(1.6, 1.0) if inside else 1.6) if high else 0.5
            seen[temperature] += 1
            assert abs(float(torch.log_softmax(z / temperature, -1)[token]) - logprob) < 1e-4
            inside = token == code[0] or (inside and token not in end)
    assert all(seen.values()), seen


async def test_equal_temperatures_are_plain_sampling_and_zero_is_greedy() -> None:
    assert await generate(Sampling(20, probe=ForkProbe(0.9, 0.9))) == await generate(Sampling(20, temperature=0.9))
    greedy = [ids for ids, _ in await generate(Sampling(20, temperature=0.0))]
    assert [ids for ids, _ in await generate(Sampling(20, probe=ForkProbe(0.0, 0.0)))] == greedy
    assert len(set(greedy)) == 1
