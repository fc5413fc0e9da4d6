"""The token ledger: what was said, token by token, and who said it.

A `Transcript` is an append-only list of `Span`s. Masks, log-probs and texts are derived from it and stored nowhere
else, so they cannot disagree. Sampled ids go in as the engine emitted them and reach the loss unchanged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Origin = Literal["prompt", "policy", "tool", "forced", "demo"]
Kind = Literal["text", "code", "observation"]
ORIGINS: tuple[Origin, ...] = ("prompt", "policy", "tool", "forced", "demo")
KINDS: tuple[Kind, ...] = ("text", "code", "observation")


class LedgerError(ValueError):
    """A span or a sample that would make the ledger lie."""


def digest_tokens(ids: Sequence[int], logprobs: Sequence[float]) -> str:
    """Hash of a sampled turn, taken by the engine before the ledger and by the learner before the loss."""
    h = hashlib.blake2b(digest_size=16)
    h.update(np.asarray(ids, dtype="<i8").tobytes())
    h.update(b"|")
    h.update(np.asarray(logprobs, dtype="<f4").tobytes())
    return h.hexdigest()


@dataclass(frozen=True)
class Span:
    """A run of token ids of one origin.

    `logprobs` (policy only): log-probability of each id under the engine's sampling distribution.
    `versions` (policy only): (offset in the span, policy version) pairs, first offset 0, strictly increasing.
    `code` (policy only): half-open range of offsets in the span that lie in a code block, or None.
    `digest` (policy only): the engine's hash of (ids, logprobs).
    """

    origin: Origin
    ids: tuple[int, ...]
    turn: int = 0
    kind: Kind = "text"
    logprobs: tuple[float, ...] | None = None
    versions: tuple[tuple[int, int], ...] = ()
    code: tuple[int, int] | None = None
    digest: str = ""

    def __post_init__(self) -> None:
        if self.origin not in ORIGINS or self.kind not in KINDS:
            raise LedgerError(f"unknown origin or kind: {self.origin!r}, {self.kind!r}")
        if self.turn < 0:
            raise LedgerError(f"turn must be >= 0, got {self.turn}")
        if self.origin == "policy":
            if self.logprobs is None or len(self.logprobs) != len(self.ids):
                raise LedgerError("a policy span needs one log-prob per id")
            if not np.all(np.isfinite(self.logprobs)):
                raise LedgerError("a policy span has a log-prob that is not finite")
            offsets = [o for o, _ in self.versions]
            if self.ids and (not offsets or offsets[0] != 0 or offsets != sorted(set(offsets))):
                raise LedgerError("versions must start at offset 0 and increase")
        elif self.logprobs is not None or self.versions:
            raise LedgerError(f"a {self.origin} span was not sampled: it has no log-probs and no versions")
        if self.code is not None and not 0 <= self.code[0] <= self.code[1] <= len(self.ids):
            raise LedgerError(f"code range {self.code} is outside the span")

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Transcript:
    """Append-only list of spans; everything else is derived. The first span is the prompt."""

    spans: list[Span]

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self.spans = []
        for span in spans:
            self.append(span)

    def append(self, span: Span) -> None:
        """Raises `LedgerError` when a prompt follows anything else, or a turn number goes back."""
        if self.spans:
            if span.origin == "prompt":
                raise LedgerError("the prompt comes first and once")
            if span.turn < self.spans[-1].turn:
                raise LedgerError(f"turn {span.turn} after turn {self.spans[-1].turn}")
        elif span.origin != "prompt":
            raise LedgerError(f"a transcript starts with its prompt, got {span.origin!r}")
        self.spans.append(span)

    def __len__(self) -> int:
        return sum(len(s) for s in self.spans)

    @property
    def ids(self) -> list[int]:
        return [i for s in self.spans for i in s.ids]

    @property
    def prompt_len(self) -> int:
        return len(self.spans[0]) if self.spans else 0

    @property
    def action_mask(self) -> list[int]:
        """[T] 1 = sampled by the policy."""
        return [int(s.origin == "policy") for s in self.spans for _ in s.ids]

    @property
    def demo_mask(self) -> list[int]:
        """[T] 1 = shown for imitation (SFT), observations excluded."""
        return [int(s.origin == "demo" and s.kind != "observation") for s in self.spans for _ in s.ids]

    @property
    def logprobs(self) -> list[float]:
        """[T] log-probs under the engine, 0.0 where nothing was sampled."""
        return [x for s in self.spans for x in (s.logprobs if s.logprobs is not None else (0.0,) * len(s))]

    @property
    def turns(self) -> list[int]:
        return [s.turn for s in self.spans for _ in s.ids]

    @property
    def kinds(self) -> list[int]:
        """[T] index into `KINDS`; tokens inside a span's code range count as code."""
        out: list[int] = []
        for s in self.spans:
            row = [KINDS.index(s.kind)] * len(s)
            if s.code is not None:
                row[s.code[0] : s.code[1]] = [KINDS.index("code")] * (s.code[1] - s.code[0])
            out.extend(row)
        return out

    @property
    def policy_spans(self) -> list[Span]:
        return [s for s in self.spans if s.origin == "policy"]

    @property
    def n_action(self) -> int:
        return sum(len(s) for s in self.policy_spans)

    @property
    def digests(self) -> list[str]:
        """The engine's hashes of the sampled turns, in order."""
        return [s.digest for s in self.policy_spans]


@dataclass(frozen=True)
class Sample:
    """A view of a transcript that is trained on: target tokens `train[0]:train[1]` (positions in the transcript).

    Within the view the loss sees sampled tokens, and in SFT demo tokens that are not observations.
    """

    transcript: Transcript
    train: tuple[int, int]

    def __post_init__(self) -> None:
        start, end = self.train
        if not 1 <= start <= end <= len(self.transcript):
            raise LedgerError(f"train range {self.train} is outside 1..{len(self.transcript)}")

    @classmethod
    def whole(cls, transcript: Transcript) -> Sample:
        """Everything after the prompt."""
        return cls(transcript, (transcript.prompt_len, len(transcript)))
