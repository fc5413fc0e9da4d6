"""What the client of a vLLM server knows of a trajectory and of the turn that is being sampled.

Where a turn ends is decided here, token by token, with the same code as in the embedded engine: the server's own stop
strings only save it from sampling tokens that would be thrown away.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from retool.engines.base import Completion, EngineError, Sampling
from retool.engines.rows import Finish
from retool.engines.text import Pieces, Tail
from retool.engines.vllm_adapter import Chunk, Server

if TYPE_CHECKING:
    from retool.engines.vllm_server import LocalServer


@dataclass(eq=False)
class Replica:
    """One server. `tag`: of the weights it was given last; not `good`: it has to be looked at before it is used."""

    server: Server
    local: LocalServer | None = None
    sessions: int = 0
    good: bool = False
    why: str = "it was not asked yet"
    tag: str = ""
    lost: BaseException | None = None
    asleep: bool = False
    contact: float = 0.0  # monotonic time of its last answer

    def lose(self, error: BaseException) -> None:
        """It failed."""
        self.good, self.why, self.lost = False, str(error), error


@dataclass(eq=False)
class Thread:
    """One trajectory on its replica. `said`: ids sampled since the last foreign token."""

    replica: Replica
    seed: int
    ids: list[int]
    tail: Tail
    said: list[int] = field(default_factory=list)
    fresh: int = 0  # foreign tokens that no request has carried yet
    forks: int = 0
    closed: bool = False
    turn: Turn | None = None
    task: asyncio.Task[None] | None = None


@dataclass(eq=False)
class Turn:
    """One pending `generate`; nothing of the thread changes before it has ended well."""

    thread: Thread
    sampling: Sampling
    budget: int
    eos: frozenset[int]
    tail: Tail
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[tuple[int, int]] = field(default_factory=list)
    finish: Finish | None = None
    stop: str | None = None

    @classmethod
    def new(cls, thread: Thread, sampling: Sampling, budget: int, eos: frozenset[int]) -> Turn:
        return cls(thread, sampling, budget, eos, thread.tail.copy())

    @property
    def keep(self) -> int:
        """Characters of text that strings need to be found."""
        return max((len(s) for s in (*self.sampling.stop, *self.sampling.banned)), default=1)

    def mark_version(self, version: int) -> None:
        """Tokens from here on are of this policy version."""
        offset = len(self.ids)
        if self.versions and self.versions[-1][0] == offset:
            self.versions.pop()
        if not self.versions or self.versions[-1][1] != version:
            self.versions.append((offset, version))

    def push(self, chunk: Chunk) -> bool:
        """Take tokens in up to the turn's end; True when that is reached. Raises `EngineError` when a banned string
        came through (fragments of characters may spell one)."""
        keep = self.keep
        strings = (*self.sampling.banned, *self.sampling.stop)
        for token, logprob in zip(chunk.ids, chunk.logprobs):
            self.ids.append(token)
            self.logprobs.append(logprob)
            hit = self.tail.push(token, strings, keep)
            if hit is not None and hit in self.sampling.banned:
                raise EngineError(f"vLLM sampled the banned string {hit!r}")
            if token in self.eos:
                self.finish = "eos"
            elif hit is not None and len(self.ids) > self.sampling.min_tokens:
                self.finish, self.stop = "stop", hit
            elif len(self.ids) >= self.budget:
                self.finish = "length"
            if self.finish is not None:
                return True
        return False

    def commit(self) -> Completion:
        """Write the ended turn into its thread."""
        assert self.finish is not None
        thread = self.thread
        thread.ids.extend(self.ids)
        thread.said.extend(self.ids)
        thread.tail = self.tail
        return Completion.of(self.ids, self.logprobs, self.versions, self.finish, self.stop)


def new_thread(replica: Replica, seed: int, ids: list[int], pieces: Pieces) -> Thread:
    """A trajectory that has said nothing yet."""
    return Thread(replica, seed, list(ids), Tail(pieces), fresh=len(ids))
