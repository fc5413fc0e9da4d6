"""State of the embedded engine's trajectories: what was said, what of it is cached, which turn is being sampled."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Literal

from retool.engines.base import Completion, EngineError, Sampling
from retool.engines.text import Bans, Pieces, Tail

Finish = Literal["stop", "eos", "length"]


@dataclass
class Row:
    """One trajectory. Invariant between steps: `cached < len(ids)`, the last token is always still to be fed."""

    seed: int
    key: tuple[int, ...]  # order of opening; a fork sorts behind its parent
    ids: list[int]
    foreign: bytearray  # [len(ids)] 1 = not sampled here
    tail: Tail
    slot: int | None = None
    cached: int = 0  # tokens whose keys and values lie in the slot
    fed: int = 0  # tokens that were fed at least once
    forks: int = 0
    used_at: int = 0  # engine clock of the last turn, for eviction
    closed: bool = False
    turn: Turn | None = None

    @classmethod
    def new(cls, seed: int, key: tuple[int, ...], ids: list[int], pieces: Pieces) -> Row:
        return cls(seed, key, list(ids), bytearray(b"\1" * len(ids)), Tail(pieces))

    def branch(self, seed: int, key: tuple[int, ...]) -> Row:
        """A copy without slot and turn."""
        return Row(seed, key, list(self.ids), bytearray(self.foreign), self.tail.copy(), fed=self.fed)

    def rollback(self, length: int) -> None:
        """Forget the tokens from `length` on: a turn that was cancelled never happened."""
        del self.ids[length:], self.foreign[length:]
        self.fed = min(self.fed, length)
        self.cached = min(self.cached, length - 1)


class Inside:
    """Whether the text sampled so far in a turn has opened a block and not closed it."""

    def __init__(self, pieces: Pieces, opens: str, closes: tuple[str, ...]) -> None:
        self.now = False
        self._opens, self._closes = (opens,) if opens else (), closes
        self._keep = max((len(s) for s in (opens, *closes)), default=1)
        self._tail = Tail(pieces)

    def push(self, token: int) -> None:
        """One more sampled token."""
        if self._tail.push(token, self._closes if self.now else self._opens, self._keep) is not None:
            self.now = not self.now


@dataclass
class Turn:
    """One pending `generate`."""

    row: Row
    sampling: Sampling
    budget: int
    deadline: float | None
    future: asyncio.Future[Completion]
    bans: Bans | None
    early: Bans | None  # bans of the first `min_tokens` tokens
    keep: int  # characters of text that strings need to be found
    code: Inside | None = None  # whether the next token is code; only for `Sampling.probe`
    start: int = 0
    tail: Tail | None = None  # as it was before the turn
    logprobs: list[float] = field(default_factory=list)
    versions: list[tuple[int, int]] = field(default_factory=list)
    finish: Finish | None = None
    stop: str | None = None
    error: EngineError | None = None
    abandoned: bool = False

    def active_bans(self) -> Bans | None:
        return self.early if self.early is not None and len(self.logprobs) < self.sampling.min_tokens else self.bans

    def mark_version(self, version: int) -> None:
        """Tokens from here on are of this policy version."""
        offset = len(self.logprobs)
        if self.versions and self.versions[-1][0] == offset:
            self.versions.pop()
        if not self.versions or self.versions[-1][1] != version:
            self.versions.append((offset, version))

    @property
    def done(self) -> bool:
        return self.finish is not None or self.error is not None

    def completion(self) -> Completion:
        assert self.finish is not None
        return Completion.of(self.row.ids[self.start :], self.logprobs, self.versions, self.finish, self.stop)

    def undo(self) -> None:
        """As if the turn had never begun."""
        self.row.rollback(self.start)
        if self.tail is not None:
            self.row.tail = self.tail
