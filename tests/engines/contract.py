"""What every engine must do. A test class of an engine inherits `EngineContract` and says how to make one.

Engines that have weights also inherit `WeightsContract`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
import torch

from retool.engines.base import Completion, ContextOverflow, DeadlineExceeded, EngineError, Sampling
from retool.transcript import digest_tokens
from tests.engines.speakers import PROMPT, REST, RESULT, STOP, TURN, encode

ATTEMPTS = 10  # to meet a server amid a turn


class EngineContract:
    """`make(kind, **options)` gives an engine that says TURN behind PROMPT and REST behind RESULT when greedy.

    `kind`: `bpe` (multi-token stop string, merged with what follows) or `tags` (the stop string is one token).
    """

    def make(self, kind: str, **options: Any) -> Any:
        raise NotImplementedError

    def tokenizer(self, kind: str) -> Any:
        raise NotImplementedError

    @pytest.mark.parametrize("kind", ["bpe", "tags"])
    async def test_a_dialogue_keeps_every_id(self, kind: str) -> None:
        engine, tok = self.make(kind), self.tokenizer(kind)
        prompt, result = encode(tok, PROMPT), encode(tok, RESULT)
        session = await engine.open(prompt, seed=1)
        first = await session.generate(Sampling(64, temperature=0, stop=(STOP,)))
        assert first.finish == "stop" and first.stop == STOP
        said = tok.decode(first.ids)
        # the stop string's own tokens are kept, and the token that completed it is never cut
        assert said in (TURN, TURN.rstrip("\n")) and list(first.ids) == encode(tok, TURN)[: len(first.ids)]
        assert tok.decode(first.ids[:-1]).find(STOP) == -1
        await session.append(result)
        second = await session.generate(Sampling(64, temperature=0, stop=(STOP,)))
        assert second.finish == "eos" and second.ids[-1] == tok.eos_token_id and second.stop is None
        assert REST in tok.decode(second.ids)
        assert session.ids == (*prompt, *first.ids, *result, *second.ids)
        for c in (first, second):
            assert c.digest == digest_tokens(c.ids, c.logprobs)
            assert len(c.ids) == len(c.logprobs) and all(x <= 0 for x in c.logprobs)
            assert c.versions == ((0, 0),)
        await session.close()
        await session.close()
        await engine.close()

    async def test_bpe_stop_ends_inside_a_token(self) -> None:
        """The fixture really merges: otherwise the test above would prove nothing."""
        tok = self.tokenizer("bpe")
        ids = encode(tok, TURN)
        assert tok.decode(ids[-1:]) == ">\n" and len(encode(tok, STOP)) > 1

    @pytest.mark.parametrize("kind", ["bpe", "tags"])
    async def test_only_the_delta_is_prefilled(self, kind: str) -> None:
        engine, tok = self.make(kind), self.tokenizer(kind)
        prompt, result = encode(tok, PROMPT), encode(tok, RESULT)
        session = await engine.open(prompt, seed=1)
        for _ in range(3):
            await session.generate(Sampling(3, temperature=0))
            await session.append(result)
        await session.generate(Sampling(1, temperature=0))
        stats = engine.stats()
        assert stats["prefilled"] == len(prompt) + 3 * len(result)
        assert stats["decoded"] == 10
        assert stats.get("replayed", 0) == 0
        await engine.close()

    async def test_budget(self) -> None:
        engine, tok = self.make("tags"), self.tokenizer("tags")
        session = await engine.open(encode(tok, PROMPT), seed=1)
        a = await session.generate(Sampling(5, temperature=0, stop=(STOP,)))
        b = await session.generate(Sampling(64, temperature=0, stop=(STOP,)))
        assert (a.finish, len(a.ids), b.finish) == ("length", 5, "stop")
        assert tok.decode([*a.ids, *b.ids]) == TURN.rstrip("\n")
        await engine.close()

    async def test_min_tokens_come_before_stop_and_end(self) -> None:
        engine, tok = self.make("tags"), self.tokenizer("tags")
        need = len(encode(tok, TURN)) + 2
        session = await engine.open(encode(tok, PROMPT), seed=1)
        c = await session.generate(Sampling(need, temperature=0, stop=(STOP,), min_tokens=need))
        assert c.finish == "length" and len(c.ids) == need
        await engine.close()

    async def test_overflow(self) -> None:
        engine, tok = self.make("tags"), self.tokenizer("tags")
        context = engine.capabilities.context
        word = encode(tok, "a")
        with pytest.raises(ContextOverflow):
            await engine.open(word * context, seed=0)
        session = await engine.open(word * (context - 2), seed=0)
        with pytest.raises(ContextOverflow):
            await session.append(word * 3)
        c = await session.generate(Sampling(50, temperature=0, min_tokens=2))
        assert c.finish == "length" and len(c.ids) == 2
        with pytest.raises(ContextOverflow):
            await session.generate(Sampling(1))
        with pytest.raises(ValueError):
            await engine.open([], seed=0)
        await engine.close()

    async def test_fork(self) -> None:
        engine, tok = self.make("tags"), self.tokenizer("tags")
        session = await engine.open(encode(tok, PROMPT), seed=1)
        await session.generate(Sampling(64, temperature=0, stop=(STOP,)))
        await session.append(encode(tok, RESULT))
        before = session.ids
        branches = await session.fork(3)
        said = await asyncio.gather(*(b.generate(Sampling(64, temperature=0)) for b in branches))
        assert {c.ids for c in said} == {said[0].ids} and REST in tok.decode(said[0].ids)
        assert session.ids == before
        assert (await session.generate(Sampling(64, temperature=0))).ids == said[0].ids
        for b in branches:
            await b.close()
        await engine.close()

    async def test_deadline(self) -> None:
        engine, tok = self.make("tags"), self.tokenizer("tags")
        session = await engine.open(encode(tok, PROMPT), seed=1)
        with pytest.raises(DeadlineExceeded):
            await session.generate(Sampling(64, temperature=0, stop=(STOP,)), deadline=time.monotonic() - 1)
        c = await session.generate(Sampling(64, temperature=0, stop=(STOP,)), deadline=time.monotonic() + 600)
        assert tok.decode(c.ids) == TURN.rstrip("\n")  # a turn that ran out of time left nothing behind
        await engine.close()

    async def test_cancel_leaves_nothing_behind(self) -> None:
        engine, tok = self.make("tags"), self.tokenizer("tags")
        prompt = encode(tok, PROMPT)
        session = await engine.open(prompt, seed=1)
        for _ in range(2):
            task = asyncio.create_task(session.generate(Sampling(100, temperature=0, min_tokens=100)))
            await asyncio.sleep(0)
            assert task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await _settled(engine)
            assert session.ids == tuple(prompt)
        c = await session.generate(Sampling(64, temperature=0, stop=(STOP,)))
        assert tok.decode(c.ids) == TURN.rstrip("\n")
        await engine.close()

    async def test_closed_sessions_and_engines_refuse(self) -> None:
        engine, tok = self.make("tags"), self.tokenizer("tags")
        session = await engine.open(encode(tok, PROMPT), seed=1)
        await session.close()
        with pytest.raises(EngineError):
            await session.generate(Sampling(1))
        with pytest.raises(EngineError):
            await session.append([1])
        with pytest.raises(EngineError):
            await session.fork(2)
        await engine.close()
        await engine.close()

    async def test_sync_changes_versions(self) -> None:
        engine, tok = self.make("tags"), self.tokenizer("tags")
        session = await engine.open(encode(tok, PROMPT), seed=1)
        a = await session.generate(Sampling(4, temperature=0))
        await engine.sync(None, version=7)
        b = await session.generate(Sampling(64, temperature=0, stop=(STOP,)))
        assert a.versions == ((0, 0),) and b.versions == ((0, 7),)
        assert tok.decode([*a.ids, *b.ids]) == TURN.rstrip("\n")
        await engine.close()


async def _settled(engine: Any) -> None:
    """A cancelled turn is undone at the next tick; wait for it the way a caller would: by using the engine."""
    await engine.sync(None, version=engine.version)


async def turns_amid_updates(
    engine: Any, prompt: list[int], update: Callable[[int], Awaitable[None]]
) -> tuple[list[Completion], range]:
    """Eight turns of 200 tokens that two updates met while all of them ran, and the versions of then.

    A server does not wait for this process: on a busy machine it may have ended turns before an update reaches it, so
    that this takes several attempts. Turns that an update did not meet are checked as well.
    """

    async def one(seed: int) -> Completion:
        session = await engine.open(prompt, seed=seed)
        try:
            return await session.generate(Sampling(200, temperature=1.0, min_tokens=200))
        finally:
            await session.close()

    for first in range(0, ATTEMPTS * 2, 2):
        running = [asyncio.create_task(one(i)) for i in range(8)]
        cut = []
        for version in (first + 1, first + 2):
            await ticks(engine, engine.stats()["ticks"] + 40, running)
            before = engine.stats()["cut"]
            await update(version)
            cut.append(engine.stats()["cut"] - before)
        turns = await asyncio.gather(*running)
        versions = range(first, first + 3)
        seen = [[v for _, v in turn.versions] for turn in turns]
        assert all(row == sorted(set(row)) and set(row) <= set(versions) for row in seen), seen
        assert sum(row[-1] == versions[-1] for row in seen) >= cut[-1], (seen, cut)
        if cut == [8, 8] and list(versions) in seen:
            return turns, versions
    pytest.fail(f"in {ATTEMPTS} attempts no two updates met eight running turns")


async def amid_update(
    engine: Any, prompt: list[int], sampling: Sampling, update: Callable[[int], Awaitable[None]], first: int = 1
) -> tuple[Completion, int]:
    """One turn that an update met while it ran, and the new version; by as many attempts as that takes."""
    for version in range(first, first + ATTEMPTS):
        session = await engine.open(prompt, seed=1)
        task = asyncio.create_task(session.generate(sampling))
        await ticks(engine, engine.stats()["ticks"] + 3, [task])
        await update(version)
        turn = await task
        await session.close()
        if len(turn.versions) > 1:
            return turn, version
        assert turn.versions[0][1] < version  # it had ended before
    pytest.fail(f"in {ATTEMPTS} attempts no update met a running turn")


async def ticks(engine: Any, n: int, running: Sequence[asyncio.Task[Any]] = ()) -> None:
    """Until the engine has sampled `n` times, or all of `running` have ended."""
    end = time.monotonic() + 600
    while engine.stats()["ticks"] < n and not (running and all(t.done() for t in running)):
        assert time.monotonic() < end, "the engine samples nothing"
        await asyncio.sleep(0.001)


class WeightsContract(EngineContract):
    """For engines over a model that this process can also run: `model(engine)` gives it. `long`: tokens of a turn that
    is still running when new weights come."""

    long = 100

    def model(self, engine: Any) -> Any:
        raise NotImplementedError

    def full_logprobs(self, engine: Any, prompt: int, ids: list[int], temperature: float = 1.0) -> list[float]:
        """Log-probs of ids[prompt:] from one plain forward pass."""
        with torch.no_grad():
            logits = self.model(engine)(input_ids=torch.tensor([ids])).logits[0].float() / temperature
        logp = torch.log_softmax(logits, -1)
        return [float(logp[i - 1, ids[i]]) for i in range(prompt, len(ids))]

    async def test_cancel_in_the_middle_of_a_turn(self) -> None:
        engine, tok = self.make("tags"), self.tokenizer("tags")
        session = await engine.open(encode(tok, PROMPT), seed=1)
        other = await engine.open(encode(tok, PROMPT), seed=2)
        beside = asyncio.create_task(other.generate(Sampling(60, temperature=0, min_tokens=60)))
        task = asyncio.create_task(session.generate(Sampling(100, temperature=0, min_tokens=100)))
        await ticks(engine, 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len((await beside).ids) == 60
        assert session.ids == tuple(encode(tok, PROMPT))
        c = await session.generate(Sampling(64, temperature=0, stop=(STOP,)))
        assert tok.decode(c.ids) == TURN.rstrip("\n")
        await engine.close()

    @pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
    async def test_logprobs_equal_a_plain_forward(self, temperature: float) -> None:
        """Over several rows of different age, with observations in between."""
        engine, tok = self.make("tags"), self.tokenizer("tags")

        async def one(i: int) -> list[tuple[int, list[int], Any]]:
            prompt = encode(tok, PROMPT + "x" * (3 * i))
            session = await engine.open(prompt, seed=i)
            said = []
            for turn in range(3):
                start = len(session.ids)
                c = await session.generate(Sampling(4 + 3 * i, temperature=temperature))
                said.append((start, list(session.ids), c))
                await asyncio.sleep(0.002 * ((5 - i) if turn else i))
                await session.append(encode(tok, RESULT * (1 + (i + turn) % 3)))
            await session.close()
            return said

        for start, ids, c in [x for s in await asyncio.gather(*(one(i) for i in range(7))) for x in s]:
            full = self.full_logprobs(engine, start, ids, temperature or 1.0)
            assert max(abs(a - b) for a, b in zip(c.logprobs, full, strict=True)) <= 1e-4
        await engine.close()

    async def test_seeds_decide_alone(self) -> None:
        """Equal seeds give equal samples, whoever else is there; other seeds give others."""
        engine, tok = self.make("tags"), self.tokenizer("tags")
        sampling = Sampling(24, temperature=1.5, min_tokens=24)

        async def one(seed: int, text: str = PROMPT) -> tuple[int, ...]:
            session = await engine.open(encode(tok, text), seed=seed)
            a = await session.generate(sampling)
            await session.append(encode(tok, RESULT))
            b = await session.generate(sampling)
            await session.close()
            return (*a.ids, *b.ids)

        alone = await one(5)
        crowd = await asyncio.gather(one(6), one(7, "other " * 6), one(5), one(8, "q"))
        assert crowd[2] == alone
        assert len({crowd[0], crowd[2], await one(9)}) == 3
        await engine.close()

    async def test_branches_have_their_own_seeds(self) -> None:
        engine, tok = self.make("tags"), self.tokenizer("tags")
        session = await engine.open(encode(tok, PROMPT), seed=1)
        branches = [*await session.fork(3), *await session.fork(2)]
        said = [(await b.generate(Sampling(20, temperature=2.0, min_tokens=20))).ids for b in branches]
        assert len(set(said)) == 5
        again = await (await engine.open(encode(tok, PROMPT), seed=1)).fork(1)
        assert (await again[0].generate(Sampling(20, temperature=2.0, min_tokens=20))).ids == said[0]
        await engine.close()

    async def test_banned_strings_never_appear_and_logprobs_are_renormalised(self) -> None:
        engine, tok = self.make("bpe"), self.tokenizer("bpe")
        prompt = encode(tok, PROMPT)
        session = await engine.open(prompt, seed=1)
        c = await session.generate(Sampling(40, temperature=0, banned=(STOP, "run")))
        text = tok.decode(c.ids)
        assert STOP not in text and "run" not in text
        full = self.full_logprobs(engine, len(prompt), list(session.ids))
        assert all(a >= b - 1e-4 for a, b in zip(c.logprobs, full, strict=True))
        assert any(a > b + 1e-2 for a, b in zip(c.logprobs, full, strict=True))
        await engine.close()

    async def test_truncated_sampling_reports_what_it_sampled_from(self) -> None:
        engine, tok = self.make("tags"), self.tokenizer("tags")
        prompt = encode(tok, PROMPT + "zz")
        session = await engine.open(prompt, seed=3)
        c = await session.generate(Sampling(30, temperature=1.3, top_k=5, top_p=0.8, min_tokens=0))
        ids = list(session.ids)
        with torch.no_grad():
            logits = self.model(engine)(input_ids=torch.tensor([ids])).logits[0].float() / 1.3
        for i, logprob in enumerate(c.logprobs):
            row = logits[len(prompt) + i - 1]
            values, best = row.topk(5)
            probs = values.softmax(-1)
            kept = int((probs.cumsum(-1) - probs < 0.8).sum())
            assert c.ids[i] in best[:kept].tolist()
            want = probs[:kept] / probs[:kept].sum()
            assert abs(logprob - float(want[best[:kept].tolist().index(c.ids[i])].log())) < 1e-4
        await engine.close()

    async def test_weights_change_in_flight(self) -> None:
        """A turn that is running goes on under the new version; its cache is forgotten, its tokens are kept."""
        engine, tok = self.make("tags"), self.tokenizer("tags")
        prompt = encode(tok, PROMPT)
        old = {k: v.clone() for k, v in self.model(engine).state_dict().items()}

        async def update(version: int) -> None:
            await engine.sync({k: v + 0.05 * torch.randn_like(v) for k, v in old.items()}, version=version)

        sampling = Sampling(self.long, temperature=0.8, min_tokens=self.long)
        c, version = await amid_update(engine, prompt, sampling, update)
        assert [v for _, v in c.versions] == [version - 1, version] and c.versions[1][0] >= 1
        split = c.versions[1][0]
        new = self.full_logprobs(engine, len(prompt), [*prompt, *c.ids], 0.8)[split:]
        # the first tokens may not end the text, which moves their log-probs: compare where nothing was forbidden
        eos = self.tokenizer("tags").eos_token_id
        with torch.no_grad():
            logits = self.model(engine)(input_ids=torch.tensor([[*prompt, *c.ids]])).logits[0].float() / 0.8
        logits[:, eos] = -torch.inf
        logp = torch.log_softmax(logits, -1)
        new = [float(logp[len(prompt) + i - 1, c.ids[i]]) for i in range(split, len(c.ids))]
        assert max(abs(a - b) for a, b in zip(c.logprobs[split:], new, strict=True)) <= 1e-4
        await engine.sync(old, version=version + 1)
        await engine.close()

    async def test_more_sessions_than_slots(self) -> None:
        """Everybody gets through, in order of arrival, and says the same as with room for all."""
        tok = self.tokenizer("tags")
        wide, narrow = self.make("tags", slots=8), self.make("tags", slots=2)

        async def one(engine: Any, i: int) -> tuple[int, ...]:
            session = await engine.open(encode(tok, PROMPT), seed=i)
            a = await session.generate(Sampling(12, temperature=1.2))
            await asyncio.sleep(0.001)
            await session.append(encode(tok, RESULT))
            b = await session.generate(Sampling(12, temperature=1.2))
            await session.close()
            return (*a.ids, *b.ids)

        said = [await asyncio.gather(*(one(e, i) for i in range(8))) for e in (wide, narrow)]
        assert said[0] == said[1]
        await wide.close()
        await narrow.close()
