"""A run of decode ticks in the worker thread: forward, sample, look for the ends of turns."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from retool.engines.base import DeadlineExceeded, EngineError
from retool.engines.forward import Forward
from retool.engines.rows import Row, Turn
from retool.engines.sampler import draw, probe_temperatures, processed_logprobs, uniforms


class NotFinite(EngineError):
    """The model gave logits that are not numbers; the same request would fail again."""

    retryable = False


class Burst:
    """Ticks over a fixed set of turns, until one of them ends or somebody interrupts."""

    def __init__(self, forward: Forward, eos: frozenset[int]) -> None:
        self.forward = forward
        self.eos = eos
        self.ticks = 0
        self.running = False
        self._interrupted = False
        self._threads = 0

    def arm(self) -> None:
        """Forget interruptions: whatever they were for is looked at from here on. Called from the event loop."""
        self._interrupted = False

    def interrupt(self) -> None:
        """Come back after the current tick. Called from the event loop."""
        self._interrupted = True

    def check_deadline(self, turn: Turn, now: float) -> None:
        """Give a turn that is out of time its error."""
        if turn.deadline is not None and now >= turn.deadline:
            turn.error = DeadlineExceeded(f"the deadline passed after {len(turn.logprobs)} tokens of the turn")

    def run(
        self,
        turns: Sequence[Turn],
        slots: Sequence[Row | None],
        version: int,
        limit: float | None,
        threads: int,
    ) -> int:
        """Decode until a turn ends, `limit` (monotonic time) passes or an interruption; gives back sampled tokens."""
        if threads != self._threads:  # the number of threads is a property of each thread that starts passes
            torch.set_num_threads(threads)
            self._threads = threads
        for turn in turns:
            turn.mark_version(version)
        plan = _Plan(turns, self.forward.device)
        rows = [t.row for t in turns]
        self.forward.prefill(rows)
        sampled = 0
        while True:
            tokens, logprobs = plan.sample(self.forward.decode(rows, slots))
            self.ticks += 1
            sampled += len(tokens)
            ended = self._book(turns, tokens, logprobs)
            if ended or self._interrupted or (limit is not None and time.monotonic() >= limit):
                return sampled

    def _book(self, turns: Sequence[Turn], tokens: list[int], logprobs: list[float]) -> bool:
        """Write one tick into the turns; True when any ended."""
        ended = False
        for turn, token, logprob in zip(turns, tokens, logprobs):
            if not logprob <= 0.0 or logprob == -np.inf:
                turn.error = NotFinite(f"token {len(turn.logprobs)} of a turn got log-prob {logprob}")
                ended = True
                continue
            row, sampling = turn.row, turn.sampling
            row.ids.append(token)
            row.foreign.append(0)
            turn.logprobs.append(logprob)
            if turn.code is not None:
                turn.code.push(token)
            hit = row.tail.push(token, sampling.stop, turn.keep)
            if token in self.eos:
                turn.finish = "eos"
            elif hit is not None and len(turn.logprobs) > sampling.min_tokens:
                turn.finish, turn.stop = "stop", hit
            elif len(turn.logprobs) >= turn.budget:
                turn.finish = "length"
            else:
                continue
            ended = True
        return ended


class _Plan:
    """What sampling needs to know about a set of turns, looked up once a burst."""

    def __init__(self, turns: Sequence[Turn], device: torch.device) -> None:
        self.turns = turns
        settings = [t.sampling for t in turns]
        self.temperature = torch.tensor([s.temperature for s in settings], dtype=torch.float32, device=device)
        self.top_k = [s.top_k for s in settings]
        self.top_p = [s.top_p for s in settings]
        self.greedy = [s.temperature == 0 for s in settings]
        self.seeds = [t.row.seed for t in turns]
        self.probes = [t.sampling.probe for t in turns]
        self.probed = any(p is not None for p in self.probes)
        self.banned = any(t.bans is not None or t.early is not None for t in turns)

    def sample(self, logits: torch.Tensor) -> tuple[list[int], list[float]]:
        """One token a turn; never one that completes a banned string."""
        if self.banned:
            logits = logits.float().clone()
            for i, turn in enumerate(self.turns):
                bans = turn.active_bans()
                if bans is not None:
                    logits[i].masked_fill_(bans.mask(turn.row.tail.text), -torch.inf)
        if self.probed:
            self._set_temperatures(logits)
        counts = [len(t.row.ids) for t in self.turns]
        tokens, values = self._draw(logits, counts, 0)
        attempt = 0
        while self.banned and (bad := self._violations(tokens)):
            # only reachable where a banned string is spelled in fragments of characters, which no mask foresees
            attempt += 1
            for i in bad:
                logits[i, tokens[i]] = -torch.inf
            other_tokens, other_values = self._draw(logits, counts, attempt)
            for i in bad:
                tokens[i], values[i] = other_tokens[i], other_values[i]
        return tokens, values

    def _draw(self, logits: torch.Tensor, counts: list[int], attempt: int) -> tuple[list[int], list[float]]:
        logp = processed_logprobs(logits, self.temperature, self.top_k, self.top_p)
        return draw(logp, uniforms(self.seeds, counts, attempt), self.greedy)

    def _set_temperatures(self, logits: torch.Tensor) -> None:
        """Of rows with a probe: from their entropy at temperature 1, after bans."""
        index = [i for i, p in enumerate(self.probes) if p is not None]
        probes = [p for p in self.probes if p is not None]
        code = torch.tensor([bool(c is not None and c.now) for c in (self.turns[i].code for i in index)])
        fork, rest, threshold = (
            torch.tensor([getattr(p, name) for p in probes], dtype=torch.float32, device=logits.device)
            for name in ("fork", "rest", "entropy")
        )
        chosen = probe_temperatures(logits[index], fork, rest, threshold, code.to(logits.device))
        self.temperature[index] = chosen
        for i, value in zip(index, chosen.tolist()):
            self.greedy[i] = value == 0

    def _violations(self, tokens: list[int]) -> list[int]:
        """Turns whose token completes a banned string."""
        return [
            i
            for i, turn in enumerate(self.turns)
            if (bans := turn.active_bans()) is not None and turn.row.tail.completes(tokens[i], bans.banned)
        ]
