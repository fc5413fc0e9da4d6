"""From `TrainSample`s to what the learner computes on: a ragged batch of columns and the input ids of each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from retool.objectives import Batch
from retool.objectives.keyed import key_of, problem_key
from retool.records import TrainSample
from retool.transcript import KINDS, Sample, Span


@dataclass(frozen=True)
class SpanCheck:
    """Where a sampled span lies in its sample's target tokens: span[offset:offset+length] is target[start:...]."""

    start: int
    offset: int
    length: int
    span: Span


@dataclass(frozen=True)
class Rollout:
    """`batch`: columns of the target tokens. `rows`: ids of each sample up to its last target. `starts`: index of the
    first target in it. `checks`: the sampled spans of each sample, to compare what is trained with what was sampled."""

    batch: Batch
    rows: list[np.ndarray]
    starts: list[int]
    ids: list[str]
    checks: list[list[SpanCheck]]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Sequence[int]) -> Rollout:
        """The samples `rows`, in that order."""
        return self.following(self.batch.take(rows), rows)

    def following(self, batch: Batch, rows: Sequence[int]) -> Rollout:
        """`batch` already holds just the samples `rows`: everything else follows it."""
        return Rollout(
            batch.with_samples(index=torch.arange(len(batch))),
            [self.rows[i] for i in rows],
            [self.starts[i] for i in rows],
            [self.ids[i] for i in rows],
            [self.checks[i] for i in rows],
        )


def collate(samples: Sequence[TrainSample], train_on: Literal["sampled", "demo"], dtype: torch.dtype) -> Rollout:
    """Rows in the order of their ids, so that the order of arrival changes nothing. Raises `ValueError` for no samples
    or a repeated id. Token columns: `action, logp_rollout, turn, kind, segment`, and
    `turn_reward` where rewards are given by turns; sample columns: as in `TrainSample`.
    """
    if not samples:
        raise ValueError("the learner got no samples: the collector must keep at least one usable trajectory")
    ordered = sorted(samples, key=lambda s: key_of("row", s.id))
    if len({s.id for s in ordered}) != len(ordered):
        raise ValueError("two samples have the same id; ids must be unique in a rollout")
    parts = [_row(s.sample, train_on) for s in ordered]
    lengths = [len(p.action) for p in parts]
    offsets = torch.zeros(len(parts) + 1, dtype=torch.int64)
    offsets[1:] = torch.cumsum(torch.tensor(lengths), 0)
    groups = {name: i for i, name in enumerate(sorted({s.group for s in ordered}))}
    tokens = {
        "action": torch.from_numpy(np.concatenate([p.action for p in parts])),
        "logp_rollout": torch.from_numpy(np.concatenate([p.logp for p in parts])).to(dtype),
        "turn": torch.from_numpy(np.concatenate([p.turn for p in parts])),
        "kind": torch.from_numpy(np.concatenate([p.kind for p in parts])),
        "segment": torch.from_numpy(np.concatenate([p.segment for p in parts])),
    }
    if any(s.turn_rewards for s in ordered):
        rewards = [_turn_rewards(s, p.action, p.turn) for s, p in zip(ordered, parts)]
        tokens["turn_reward"] = torch.from_numpy(np.concatenate(rewards)).to(dtype)
    columns = {
        "index": torch.arange(len(ordered)),
        "group": torch.tensor([groups[s.group] for s in ordered]),
        "key": torch.tensor([key_of("trajectory", s.id) for s in ordered]),
        "problem": torch.tensor([problem_key(s.problem) for s in ordered]),
        "pair": torch.tensor([s.pair for s in ordered]),
        "parent": torch.tensor([s.parent for s in ordered]),
        "cluster": torch.tensor([s.cluster for s in ordered]),
        "score": torch.tensor([s.score for s in ordered], dtype=dtype),
        "accuracy": torch.tensor([s.accuracy for s in ordered], dtype=dtype),
        "tool_error_rate": torch.tensor([s.tool_error_rate for s in ordered], dtype=dtype),
        "tool_calls": torch.tensor([s.tool_calls for s in ordered]),
        "format_penalty": torch.tensor([s.format_penalty for s in ordered], dtype=dtype),
        "void": torch.tensor([s.void for s in ordered]),
        "truncated": torch.tensor([s.truncated for s in ordered]),
        "in_baseline": torch.tensor([s.in_baseline for s in ordered]),
        "in_loss": torch.tensor([s.in_loss for s in ordered]),
    }
    return Rollout(
        Batch(offsets, tokens, columns),
        [p.ids for p in parts],
        [p.start for p in parts],
        [s.id for s in ordered],
        [p.checks for p in parts],
    )


def _turn_rewards(sample: TrainSample, action: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """[N] each turn's own reward on its last action token; a turn that is not trained on has none."""
    out = np.zeros(len(action), dtype=np.float64)
    turns = [s.turn for s in sample.sample.transcript.policy_spans]
    for number, reward in zip(turns, sample.turn_rewards):
        if len(where := np.flatnonzero(action & (turn == number))):
            out[where[-1]] += reward
    return out


@dataclass(frozen=True)
class _Row:
    ids: np.ndarray
    start: int
    action: np.ndarray
    logp: np.ndarray
    turn: np.ndarray
    kind: np.ndarray
    segment: np.ndarray
    checks: list[SpanCheck]


def _row(sample: Sample, train_on: Literal["sampled", "demo"]) -> _Row:
    """The arrays of one sample; one pass over its spans."""
    start, end = sample.train
    spans = sample.transcript.spans
    bounds = np.cumsum([0, *(len(s) for s in spans)])
    ids = np.concatenate([np.asarray(s.ids, dtype=np.int64) for s in spans])[:end]
    n = end - start
    action, logp = np.zeros(n, dtype=bool), np.zeros(n, dtype=np.float64)
    turn, kind, segment = (np.zeros(n, dtype=np.int64) for _ in range(3))
    checks = []
    for index, (span, first) in enumerate(zip(spans, bounds.tolist())):
        lo, hi = max(first, start), min(first + len(span), end)
        if lo >= hi:
            continue
        here = slice(lo - start, hi - start)
        turn[here], kind[here], segment[here] = span.turn, KINDS.index(span.kind), index
        if span.code is not None:
            code_lo, code_hi = max(first + span.code[0], lo), min(first + span.code[1], hi)
            kind[code_lo - start : max(code_lo, code_hi) - start] = KINDS.index("code")
        if span.origin == "policy":
            action[here] = True
            logp[here] = np.asarray(span.logprobs)[lo - first : hi - first]
            checks.append(SpanCheck(lo - start, lo - first, hi - lo, span))
        elif span.origin == "demo":
            action[here] = train_on == "demo" and span.kind != "observation"
    return _Row(ids, start, action, logp, turn, kind, segment, checks)
