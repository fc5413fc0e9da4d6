"""The scripted engine keeps the contract and fails when told to."""

from __future__ import annotations

from typing import Any

import pytest

from retool.engines.base import EngineError, Sampling
from retool.engines.scripted import ScriptedEngine
from tests.engines.contract import EngineContract
from tests.engines.speakers import PROMPT, REST, RESULT, STOP, TURN, bpe_tokenizer, encode, tag_tokenizer


class TestScripted(EngineContract):
    def tokenizer(self, kind: str) -> Any:
        return bpe_tokenizer() if kind == "bpe" else tag_tokenizer()

    def make(self, kind: str, **options: Any) -> ScriptedEngine:
        said = {"bpe": TURN, "tags": TURN + REST}[kind]
        return ScriptedEngine(
            self.tokenizer(kind),
            lambda prompt, turn, text: REST if text.endswith(RESULT) else said + "a" * 100,
            context=128,
            delay=0.001,
        )


async def test_fails_as_often_as_told() -> None:
    engine = ScriptedEngine(tag_tokenizer(), {"Say": ["one", "two"]})
    engine.failures = 2
    session = await engine.open(encode(tag_tokenizer(), PROMPT), seed=0)
    for _ in range(2):
        with pytest.raises(EngineError, match="scripted failure"):
            await session.generate(Sampling(10))
    said = [tag_tokenizer().decode((await session.generate(Sampling(10))).ids[:-1]) for _ in range(2)]
    assert said == ["one", "two"]
    with pytest.raises(LookupError, match="no turn 2"):
        await session.generate(Sampling(10))


async def test_refuses_to_say_what_is_banned() -> None:
    engine = ScriptedEngine(tag_tokenizer(), {"Say": [f"x{STOP}"]})
    session = await engine.open(encode(tag_tokenizer(), PROMPT), seed=0)
    with pytest.raises(EngineError, match="banned"):
        await session.generate(Sampling(10, banned=(STOP,)))
