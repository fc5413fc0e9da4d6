"""Lockstep: what is sampled, to the last bit, does not depend on how long tools take or in which order they end."""

from __future__ import annotations

import asyncio
import random

import pytest

from retool.engines.base import Completion, EngineError, Sampling
from retool.engines.transformers_engine import TransformersEngine
from tests.engines.speakers import PROMPT, RESULT, encode, small_llama, tag_tokenizer

N = 9


async def wave(engine: TransformersEngine, jitter: random.Random, forks: bool = False) -> list[list[Completion]]:
    """Nine trajectories of one to four turns whose tools take random times."""
    tok = tag_tokenizer()
    engine.expect(N)

    async def one(i: int) -> list[Completion]:
        session = await engine.open(encode(tok, PROMPT + "y" * (2 * i)), seed=100 + i)
        said = []
        for turn in range(1 + i % 4):
            said.append(await session.generate(Sampling(3 + 2 * ((i + turn) % 5), temperature=1.1)))
            await asyncio.sleep(jitter.random() * 0.01)
            if turn < i % 4:
                await session.append(encode(tok, RESULT * (1 + turn)))
        if forks and i % 2:
            branches = await session.fork(2)
            await session.close()
            await asyncio.sleep(jitter.random() * 0.01)

            async def end(b: int) -> Completion:
                await asyncio.sleep(jitter.random() * 0.005)
                c = await branches[b].generate(Sampling(5, temperature=1.1))
                await branches[b].close()
                return c

            said += await asyncio.gather(end(0), end(1))
        await session.close()
        return said

    return await asyncio.gather(*(one(i) for i in range(N)))


@pytest.mark.parametrize("forks", [False, True])
async def test_equal_bits_whatever_tools_do(forks: bool) -> None:
    engine = TransformersEngine(small_llama(tag_tokenizer()), tag_tokenizer(), slots=16, lockstep=True)
    assert engine.capabilities.deterministic
    said = [await wave(engine, random.Random(r), forks) for r in range(4)]
    fresh = TransformersEngine(small_llama(tag_tokenizer()), tag_tokenizer(), slots=16, lockstep=True)
    said.append(await wave(fresh, random.Random(9), forks))
    for other in said[1:]:
        assert other == said[0]  # ids, log-probs (exactly), versions, digests
    await engine.close()
    await fresh.close()


async def test_nobody_starts_before_everybody_is_there() -> None:
    tok = tag_tokenizer()
    engine = TransformersEngine(small_llama(tok), tok, slots=4, lockstep=True)
    engine.expect(2)
    first = await engine.open(encode(tok, PROMPT), seed=1)
    task = asyncio.create_task(first.generate(Sampling(3)))
    await asyncio.sleep(0.05)
    assert engine.stats()["ticks"] == 0
    second = await engine.open(encode(tok, PROMPT), seed=2)
    await asyncio.sleep(0.05)
    assert engine.stats()["ticks"] == 0
    await second.close()  # closed sessions hold nobody
    assert len((await task).ids) <= 3
    with pytest.raises(EngineError, match="1 sessions are open"):
        engine.expect(2)
    with pytest.raises(ValueError, match="as many slots"):
        await first.close()
        engine.expect(5)
    await engine.close()


async def test_a_turn_waiting_at_the_barrier_can_be_cancelled_and_times_out() -> None:
    tok = tag_tokenizer()
    engine = TransformersEngine(small_llama(tok), tok, slots=4, lockstep=True)
    session, idle = [await engine.open(encode(tok, PROMPT), seed=i) for i in range(2)]
    with pytest.raises(EngineError, match="deadline"):
        await session.generate(Sampling(3), deadline=asyncio.get_running_loop().time() + 0.02)
    task = asyncio.create_task(session.generate(Sampling(3)))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await idle.close()
    assert (await session.generate(Sampling(3))).ids
    await engine.close()
