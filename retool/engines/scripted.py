"""An engine whose answers are written by the caller: for tests of everything around an engine.

Honest about tokens: texts are encoded once, stop strings end a turn at the token that completes them, budgets cut,
and every id has a log-prob (a constant, since nothing was sampled).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from retool.engines.base import (
    Completion,
    ContextOverflow,
    DeadlineExceeded,
    EngineCapabilities,
    EngineError,
    Sampling,
)
from retool.engines.text import Pieces, Tail

Script = Callable[[str, int, str], str] | Mapping[str, Sequence[str]]


class ScriptedSession:
    """See `retool.engines.base.Session`."""

    def __init__(self, engine: ScriptedEngine, prompt: list[int], ids: list[int], turn: int) -> None:
        self._engine = engine
        self._prompt = prompt
        self._ids = ids
        self._turn = turn
        self._left: list[int] = []  # what a budget or a stop string cut off the text of the turn
        self._closed = False

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(self._ids)

    async def generate(self, sampling: Sampling, deadline: float | None = None) -> Completion:
        engine = self._engine
        if self._closed:
            raise EngineError("the session is closed")
        await asyncio.sleep(engine.delay)
        if engine.failures > 0:
            engine.failures -= 1
            raise EngineError("scripted failure")
        if deadline is not None and time.monotonic() >= deadline:
            raise DeadlineExceeded("the deadline passed before the first token")
        room = min(sampling.max_tokens, engine.context - len(self._ids))
        if room < 1:
            raise ContextOverflow(f"the trajectory has {len(self._ids)} tokens, no room in {engine.context}")
        fresh = not self._left
        planned = self._left or engine.text_ids(self._prompt, self._turn, self._ids)
        taken, finish, stop = engine.cut(planned, sampling, room)
        self._left = planned[len(taken) :] if finish == "length" else []
        self._turn += int(fresh)
        self._ids.extend(taken)
        engine.counts["decoded"] += len(taken)
        return Completion.of(taken, [engine.logprob] * len(taken), [(0, engine.version)], finish, stop)

    async def append(self, ids: Sequence[int]) -> None:
        if self._closed:
            raise EngineError("the session is closed")
        if len(self._ids) + len(ids) > self._engine.context:
            raise ContextOverflow(f"{len(self._ids)} + {len(ids)} tokens do not fit into {self._engine.context}")
        self._ids.extend(ids)
        self._left = self._left if not ids else []
        self._engine.counts["prefilled"] += len(ids)

    async def fork(self, n: int) -> list[ScriptedSession]:
        if self._closed:
            raise EngineError("the session is closed")
        made = [ScriptedSession(self._engine, self._prompt, list(self._ids), self._turn) for _ in range(n)]
        for child in made:
            child._left = list(self._left)
        return made

    async def close(self) -> None:
        self._closed = True


class ScriptedEngine:
    """`script`: (prompt text, turn from 0, text after the prompt) -> the turn's text, or texts of the turns by prompt.

    A turn ends with the end-of-text token unless a stop string or the budget ends it first. Banned strings are an
    `EngineError`, since a script has nothing else to say. `failures`: so many coming `generate` calls raise
    `EngineError`. `delay`: seconds each turn takes.
    """

    def __init__(
        self, tokenizer: Any, script: Script, context: int = 4096, logprob: float = -0.1, delay: float = 0.0
    ) -> None:
        self.tokenizer = tokenizer
        self.script = script
        self.context = context
        self.logprob = logprob
        self.delay = delay
        self.failures = 0
        self.version = 0
        self.counts = {"prefilled": 0, "decoded": 0}
        self._pieces = Pieces(tokenizer, len(tokenizer))

    @property
    def capabilities(self) -> EngineCapabilities:
        return EngineCapabilities(context=self.context)

    def stats(self) -> dict[str, int]:
        return dict(self.counts)

    async def open(self, prompt_ids: Sequence[int], seed: int) -> ScriptedSession:
        if not prompt_ids:
            raise ValueError("a prompt needs at least one token")
        if len(prompt_ids) >= self.context:
            raise ContextOverflow(f"a prompt of {len(prompt_ids)} tokens leaves no room in {self.context}")
        self.counts["prefilled"] += len(prompt_ids)
        return ScriptedSession(self, list(prompt_ids), list(prompt_ids), 0)

    async def sync(self, weights: Mapping[str, Any] | None, version: int) -> None:
        self.version = version

    async def close(self) -> None:
        """Nothing is held."""

    def text_ids(self, prompt: list[int], turn: int, ids: list[int]) -> list[int]:
        """Ids of a whole scripted turn, the end-of-text token included."""
        text = self._pieces.decode(prompt)
        if callable(self.script):
            said = self.script(text, turn, self._pieces.decode(ids[len(prompt) :]))
        else:
            turns = next((t for p, t in self.script.items() if p in text), None)
            if turns is None or turn >= len(turns):
                raise LookupError(f"the script has no turn {turn} for the prompt {text!r}")
            said = turns[turn]
        return [*self.tokenizer.encode(said, add_special_tokens=False), self.tokenizer.eos_token_id]

    def cut(self, planned: list[int], sampling: Sampling, room: int) -> tuple[list[int], Any, str | None]:
        """What of a turn is said under these limits: (ids, finish, stop string)."""
        tail = Tail(self._pieces)
        strings = (*sampling.banned, *sampling.stop)
        keep = max((len(s) for s in strings), default=1)
        for n, token in enumerate(planned[:room], start=1):
            hit = tail.push(token, strings, keep)
            if hit in sampling.banned:
                raise EngineError(f"the script says {hit!r}, which is banned")
            if token == self.tokenizer.eos_token_id:
                return planned[:n], "eos", None
            if hit is not None and n > sampling.min_tokens:
                return planned[:n], "stop", hit
        return planned[:room], "length", None
