"""What an engine is: weights in, tokens out. Every engine passes `tests/engines/contract.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from retool.transcript import digest_tokens


class EngineError(Exception):
    """The engine broke: our fault, retried, then the trajectory is dropped."""

    retryable = True


class ContextOverflow(EngineError):
    """More tokens than the context holds were appended. A caller's bug: not retryable."""

    retryable = False


class DeadlineExceeded(EngineError):
    """`deadline` passed before the turn ended."""


@dataclass(frozen=True)
class ForkProbe:
    """A temperature that depends on the position (2506.01939, section 3): `fork` where the entropy at temperature 1 is
    above `entropy` nats, `rest` elsewhere. Between `opens` and one of `closes` (code) forks get at most 1."""

    fork: float
    rest: float
    entropy: float = 0.672
    opens: str = ""
    closes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.fork < 0 or self.rest < 0 or self.entropy < 0:
            raise ValueError("fork, rest and entropy must be >= 0")


@dataclass(frozen=True)
class Sampling:
    """How to sample one turn. `temperature` 0 means greedy. Log-probs are those of the distribution actually sampled
    from (after temperature, truncation and bans). `banned`: strings that may not be completed. `min_tokens`: no stop
    and no end of text before that many tokens. `probe`: replaces `temperature` by one that depends on the position."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    banned: tuple[str, ...] = ()
    min_tokens: int = 0
    probe: ForkProbe | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be >= 1, got {self.max_tokens}")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError("temperature >= 0, 0 < top_p <= 1 and top_k >= 0 are required")


@dataclass(frozen=True)
class Completion:
    """One sampled turn. `ids` are exactly what was sampled, the stop string's tokens and the end-of-text token
    included. `digest` was taken by the engine. `versions`: (offset, policy version)."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[tuple[int, int], ...]
    finish: Literal["stop", "eos", "length"]
    stop: str | None = None
    digest: str = ""

    @classmethod
    def of(
        cls,
        ids: Sequence[int],
        logprobs: Sequence[float],
        versions: Sequence[tuple[int, int]],
        finish: Literal["stop", "eos", "length"],
        stop: str | None = None,
    ) -> Completion:
        return cls(tuple(ids), tuple(logprobs), tuple(versions), finish, stop, digest_tokens(ids, logprobs))


@dataclass(frozen=True)
class EngineCapabilities:
    """What callers may rely on. `context`: tokens in one trajectory at most. `exact_logprobs`: log-probs are of the
    processed distribution. `fork`: `Session.fork` works. `deterministic`: lockstep mode gives equal bits. `probe`:
    `Sampling.probe` works."""

    context: int
    fork: bool = True
    exact_logprobs: bool = True
    renormalised_truncation: bool = True
    deterministic: bool = False
    probe: bool = False


class Session(Protocol):
    """One trajectory: keeps its KV, sticks to its replica. Not to be used from two tasks at once."""

    async def generate(self, sampling: Sampling, deadline: float | None = None) -> Completion:
        """Sample one turn. `deadline` is `time.monotonic()` based. Raises `EngineError`."""
        ...

    async def append(self, ids: Sequence[int]) -> None:
        """Add tokens that the policy did not sample; only they are prefilled. Raises `ContextOverflow`."""
        ...

    async def fork(self, n: int) -> list[Session]:
        """n independent continuations of this one, with their own seeds."""
        ...

    async def close(self) -> None:
        """Free its room; idempotent."""
        ...


class Engine(Protocol):
    """Weights to tokens."""

    @property
    def capabilities(self) -> EngineCapabilities: ...

    async def open(self, prompt_ids: Sequence[int], seed: int) -> Session: ...

    async def sync(self, weights: Mapping[str, Any] | None, version: int) -> None:
        """Use new weights from the next token on. None: the weights are shared and were changed in place.
        Cached KV of older versions is dropped."""
        ...

    async def close(self) -> None: ...
