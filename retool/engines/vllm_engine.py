"""The served engine: trajectories on one or many vLLM servers, which get new weights while they run.

A trajectory goes to the least loaded server and stays there, where prefix caching keeps its keys and values. An update
ends every running request at the token that arrived last, renews the weights, drops the caches, compares log-probs
with the learner's own (`ProbeMismatch` stops the run) and asks for the rest of each turn under the new version: no
turn is lost, and every token is known to be of one version.

A server that fails loses its trajectories' turns, not the trajectories: the turn raises `EngineError`, the caller opens
the trajectory again elsewhere, and the server is used again only after it took the newest weights and passed the probe.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from retool.engines.base import (
    Completion,
    ContextOverflow,
    DeadlineExceeded,
    EngineCapabilities,
    EngineError,
    Sampling,
)
from retool.engines.sampler import mix_seed
from retool.engines.text import Pieces, Tail
from retool.engines.transformers_engine import _eos_ids
from retool.engines.vllm_adapter import How, Server, ServerFailed, ServerLost, ServerRefused, request_body
from retool.engines.vllm_group import weights_of
from retool.engines.vllm_server import LocalServer
from retool.engines.vllm_turn import Replica, Thread, Turn, new_thread
from retool.engines.vllm_weights import drop

_FRESH_S = 2.0  # a server cannot have been started anew within that many seconds after it answered
_PROBE_TOKENS = 8


class ProbeMismatch(EngineError):
    """After an update the server's log-probs are not the learner's: going on would train on wrong numbers."""

    retryable = False


class VllmSession:
    """One trajectory of a `VllmEngine`; see `retool.engines.base.Session`."""

    def __init__(self, engine: VllmEngine, thread: Thread) -> None:
        self._engine = engine
        self._thread = thread

    @property
    def ids(self) -> tuple[int, ...]:
        """Everything so far."""
        return tuple(self._thread.ids)

    @property
    def url(self) -> str:
        """Of the server that holds its keys and values."""
        return self._thread.replica.server.url

    async def generate(self, sampling: Sampling, deadline: float | None = None) -> Completion:
        return await self._engine._generate(self._thread, sampling, deadline)

    async def append(self, ids: Sequence[int]) -> None:
        self._engine._append(self._thread, ids)

    async def fork(self, n: int) -> list[VllmSession]:
        """The branches share the parent's server, so its prefix is found in the cache."""
        return [VllmSession(self._engine, t) for t in self._engine._fork(self._thread, n)]

    async def close(self) -> None:
        self._engine._close_thread(self._thread)


class VllmEngine:
    """`retool.engines.base.Engine` over vLLM servers.

    `model`: the learner's, or one of one's own; `sync(None, v)` sends its weights as they are then, `sync(weights, v)`
    loads them into it first. `share`: a folder that learner and servers see at the same path. `context`: tokens in one
    trajectory. `local`: the server of `servers` that was started here, by url; it is started again when it dies.
    `sleep`: between `rest` and `sync` servers leave their GPU's memory to the learner. `sync_host`, `sync_s`: of groups
    (`vllm_group.WeightGroups`).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        servers: Sequence[Server],
        *,
        context: int,
        share: str | Path | None = None,
        weight_sync: How = "file",
        probe_tolerance: float | None = None,
        start_s: float = 600.0,
        local: Mapping[str, LocalServer] | None = None,
        sleep: bool = False,
        sync_host: str | None = None,
        sync_s: float = 300.0,
    ) -> None:
        if not servers:
            raise ValueError("a vLLM engine needs at least one server")
        self.context = context
        self._model, self._tokenizer = model, tokenizer
        self._replicas = [Replica(s, (local or {}).get(s.url)) for s in servers]
        self._pieces = Pieces(tokenizer, model.config.get_text_config().vocab_size)
        self._eos = _eos_ids(model, tokenizer)
        self._weights = weights_of(model, tokenizer, weight_sync, share=share, sync_host=sync_host, sync_s=sync_s)
        half = next(model.parameters()).dtype != torch.float32
        self._tolerance = probe_tolerance if probe_tolerance is not None else (0.2 if half else 1e-3)
        self._start_s = start_s
        self._sleep = sleep
        self._version = 0
        self._ready = False
        self._gate = asyncio.Event()
        self._lock = asyncio.Lock()
        self._reviving: asyncio.Task[None] | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._open: set[Thread] = set()
        self._counts = {"prefilled": 0, "decoded": 0, "ticks": 0, "updates": 0, "cut": 0, "lost": 0}
        self.largest_gap = 0.0
        self._fatal: ProbeMismatch | None = None
        self._closed = False

    # -- the engine's surface ---------------------------------------------------------------------------------------

    @property
    def capabilities(self) -> EngineCapabilities:
        return EngineCapabilities(context=self.context)

    @property
    def version(self) -> int:
        """Policy version of the weights in use."""
        return self._version

    def stats(self) -> dict[str, int]:
        """As the client sees it: `prefilled` (prompt and observation tokens sent), `decoded`, `ticks` (arrivals of
        tokens), `updates`, `cut` (requests an update ended), `lost` (failures of servers), `open`. What a server
        really computed is in its own metrics."""
        return {**self._counts, "open": len(self._open)}

    async def open(self, prompt_ids: Sequence[int], seed: int) -> VllmSession:
        if self._closed:
            raise EngineError("the engine is closed")
        if not prompt_ids:
            raise ValueError("a prompt needs at least one token")
        if len(prompt_ids) >= self.context:
            raise ContextOverflow(f"a prompt of {len(prompt_ids)} tokens leaves no room in {self.context}")
        if not self._ready:
            await self._update(None, self._version, first=True)
        thread = new_thread(await self._pick(), seed, list(prompt_ids), self._pieces)
        self._admit(thread)
        return VllmSession(self, thread)

    async def sync(self, weights: Mapping[str, Any] | None, version: int) -> None:
        """New weights on every server; running turns go on under them. Raises `EngineError` when they do not fit,
        `ProbeMismatch` when a server does not compute what the learner computes with them."""
        if self._closed:
            raise EngineError("the engine is closed")
        await self._update(weights, version)

    async def rest(self) -> None:
        """Nothing is to be sampled before the next `sync`; with `sleep`, servers give their GPU memory back until then.
        Turns that are asked for wait."""
        if not self._sleep or not self._ready or self._closed:
            return
        async with self._lock:
            self._gate.clear()
            await self._cut()
            # with adapters alone the next update brings no base: it has to be kept
            level = 1 if self._weights.how == "adapter" else 2
            for replica in [r for r in self._replicas if r.good and not r.asleep]:
                try:
                    await replica.server.sleep(level)
                    replica.asleep = True
                except ServerLost as error:
                    self._counts["lost"] += 1
                    replica.lose(error)

    async def _update(self, weights: Mapping[str, Any] | None, version: int, first: bool = False) -> None:
        async with self._lock:
            if first and self._ready:
                return
            if weights is not None:
                try:
                    self._model.load_state_dict(weights, strict=True)
                except RuntimeError as error:
                    raise EngineError(f"the weights do not fit the engine's model: {error}") from error
            self._model.eval()
            self._gate.clear()
            if self._sleep and torch.cuda.is_available():
                torch.cuda.empty_cache()  # what the learner is done with is what the servers wake up in
            try:
                await self._cut()
                old = await asyncio.to_thread(self._weights.save, any(r.local is not None for r in self._replicas))
                self._version = version
                self._counts["updates"] += 1
                if self._ready:
                    work = [self._install(r) for r in self._replicas if r.good]
                else:
                    work = [self._restore(r) for r in self._replicas]
                for failure in await asyncio.gather(*work, return_exceptions=True):
                    if failure is not None:
                        raise failure
                self._ready = True
                await asyncio.to_thread(drop, old)
            finally:
                self._gate.set()

    async def close(self) -> None:
        """Fail what is pending, leave the servers by URL alone and end those started here; idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._reviving is not None:
            await _end(self._reviving)
        await self._cut()
        for replica in self._replicas:
            await replica.server.close()
            if replica.local is not None:
                await asyncio.to_thread(replica.local.remove)
        await asyncio.to_thread(self._weights.close)

    # -- what sessions call -----------------------------------------------------------------------------------------

    async def _generate(self, thread: Thread, sampling: Sampling, deadline: float | None) -> Completion:
        if thread.closed or self._closed:
            raise EngineError("the session is closed")
        if thread.turn is not None:
            raise EngineError("the session is already generating")
        budget = min(sampling.max_tokens, self.context - len(thread.ids))
        if budget < 1:
            raise ContextOverflow(f"the trajectory has {len(thread.ids)} tokens, no room in {self.context}")
        turn = thread.turn = Turn.new(thread, sampling, budget, self._eos)
        try:
            while turn.finish is None:
                await self._step(turn, deadline)
        finally:
            thread.turn = None
        self._counts["prefilled"] += thread.fresh
        self._counts["decoded"] += len(turn.ids)
        thread.fresh = 0
        return turn.commit()

    async def _step(self, turn: Turn, deadline: float | None) -> None:
        """One request for the rest of a turn; comes back when the turn ended or an update cut the request."""
        thread = turn.thread
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise DeadlineExceeded(f"the deadline passed after {len(turn.ids)} tokens of the turn")
        task = thread.task = asyncio.get_running_loop().create_task(self._request(turn))
        self._running.add(task)
        try:
            done, _ = await asyncio.wait({task}, timeout=left)
        except asyncio.CancelledError:
            await _end(task)
            raise
        finally:
            self._running.discard(task)
            thread.task = None
        if not done:
            await _end(task)
            raise DeadlineExceeded(f"the deadline passed after {len(turn.ids)} tokens of the turn")
        if thread.closed or self._closed:
            if not task.cancelled():
                task.exception()
            raise EngineError("the session was closed while it generated")
        if not task.cancelled():
            task.result()

    async def _request(self, turn: Turn) -> None:
        await self._gate.wait()
        thread = turn.thread
        replica = thread.replica
        try:
            await self._still_good(replica)
            turn.mark_version(self._version)
            ids = [*thread.ids, *turn.ids]
            body = request_body(
                ids,
                turn.sampling,
                budget=turn.budget - len(turn.ids),
                seed=mix_seed(thread.seed, len(ids)),
                eos=self._eos,
                tail=[*thread.said, *turn.ids],
                sampled=len(turn.ids),
                salt=replica.tag,
                adapter=self._weights.how == "adapter",
            )
            got = 0
            async with replica.server.stream(body) as chunks:
                async for chunk in chunks:
                    replica.contact = time.monotonic()
                    self._counts["ticks"] += 1
                    got += len(chunk.ids)
                    if turn.push(chunk):
                        return
                    await asyncio.sleep(0)  # what lies in the buffer must not hide an update or a cancellation
            if not got:
                raise ServerLost(f"{replica.server.url} ended a turn without a token")
        except ServerLost as error:
            self._counts["lost"] += 1
            replica.lose(error)
            raise

    def _append(self, thread: Thread, ids: Sequence[int]) -> None:
        if thread.closed:
            raise EngineError("the session is closed")
        if thread.turn is not None:
            raise EngineError("tokens cannot be appended while the session generates")
        if len(thread.ids) + len(ids) > self.context:
            raise ContextOverflow(f"{len(thread.ids)} + {len(ids)} tokens do not fit into {self.context}")
        thread.ids.extend(ids)
        thread.fresh += len(ids)
        if ids:
            thread.tail, thread.said = Tail(self._pieces), []

    def _fork(self, thread: Thread, n: int) -> list[Thread]:
        if thread.closed or thread.turn is not None:
            raise EngineError("only an open session that is not generating can be forked")
        thread.forks += 1
        made = [
            replace(
                thread,
                seed=mix_seed(thread.seed, thread.forks, i),
                ids=list(thread.ids),
                tail=thread.tail.copy(),
                said=list(thread.said),
                forks=0,
            )
            for i in range(n)
        ]
        for child in made:
            self._admit(child)
        return made

    def _admit(self, thread: Thread) -> None:
        self._open.add(thread)
        thread.replica.sessions += 1

    def _close_thread(self, thread: Thread) -> None:
        if thread.closed:
            return
        thread.closed = True
        self._open.discard(thread)
        thread.replica.sessions -= 1
        if thread.task is not None:
            thread.task.cancel()

    # -- servers ----------------------------------------------------------------------------------------------------

    async def _pick(self) -> Replica:
        """The least loaded good server; waits for one to come back when there is none."""
        self._settle()
        if any(not r.good for r in self._replicas) and self._reviving is None:
            self._reviving = asyncio.get_running_loop().create_task(self._revive())
        while self._reviving is not None and not any(r.good for r in self._replicas):
            await asyncio.wait({self._reviving}, timeout=0.2)
            self._settle()
        if self._closed:
            raise EngineError("the engine is closed")
        if self._fatal is not None:
            raise self._fatal
        if not any(r.good for r in self._replicas):
            told = "; ".join(f"{r.server.url}: {r.why}" for r in self._replicas)
            raise EngineError(f"no vLLM server answers: {told}")
        return min((r for r in self._replicas if r.good), key=lambda r: r.sessions)

    def _settle(self) -> None:
        """What came of the last search for lost servers; a server that answers but may not be used is told once."""
        task = self._reviving
        if task is None or not task.done():
            return
        self._reviving = None
        failure = None if task.cancelled() else task.exception()
        if isinstance(failure, ProbeMismatch):
            self._fatal = failure
        elif failure is not None:
            raise failure

    async def _revive(self) -> None:
        """Bring lost servers back, for at most `start_s`; a server started here is started again."""
        end = time.monotonic() + self._start_s
        while time.monotonic() < end:
            lost = [r for r in self._replicas if not r.good]
            if not lost:
                return
            for replica in lost:
                if replica.local is not None and not replica.local.alive:
                    await asyncio.to_thread(replica.local.start, self._weights.start)
                    replica.asleep = False
                try:
                    await replica.server.check()
                except ServerLost as error:
                    replica.lose(error)
                    continue
                async with self._lock:
                    if not replica.good and self._weights.current:  # else the next update brings newer ones
                        await self._install(replica)
            await asyncio.sleep(0.5)

    async def _restore(self, replica: Replica) -> None:
        """The first contact."""
        context = await replica.server.check()
        if context < self.context:
            raise ServerRefused(
                f"{replica.server.url} allows {context} tokens, engine.context is {self.context}: "
                "start it with a larger --max-model-len or lower engine.context"
            )
        await self._install(replica)
        if isinstance(replica.lost, ServerFailed):
            raise ServerRefused(
                f"{replica.server.url} did not take this run's weights; was it started with the same model, by "
                f"`python -m retool.engines.vllm_server`? ({replica.why})"
            )

    async def _install(self, replica: Replica) -> None:
        """The newest weights on one server, and the proof; a server that is lost meanwhile is only marked."""
        try:
            await self._weights.install(replica.server, replica.asleep)
            replica.asleep = False
            replica.tag = self._weights.tag
            await self._probe(replica)
        except (ServerLost, ProbeMismatch) as error:
            if isinstance(error, ProbeMismatch) and self._weights.current:
                raise  # the learner has not moved on meanwhile
            self._counts["lost"] += 1
            replica.lose(error)
            return
        replica.contact = time.monotonic()
        replica.good, replica.why = True, ""

    async def _still_good(self, replica: Replica) -> None:
        """Raises `ServerLost` unless it has the newest weights: a server that was started anew has others."""
        if not replica.good:
            raise ServerLost(f"{replica.server.url} was lost: {replica.why}")
        if time.monotonic() - replica.contact > _FRESH_S:
            tag = await replica.server.weight_version()
            if tag != replica.tag:
                raise ServerLost(f"{replica.server.url} was started anew: its weights are {tag!r}")
            replica.contact = time.monotonic()

    async def _cut(self) -> None:
        """End every running request at the token that arrived last."""
        running = [t for t in self._running if not t.done()]
        for task in running:
            task.cancel()
        if running:
            self._counts["cut"] += len(running)
            await asyncio.wait(running)

    # -- weights ----------------------------------------------------------------------------------------------------

    async def _probe(self, replica: Replica) -> None:
        """Sample a few tokens there and compare their log-probs with a forward pass here."""
        vocab = min(len(self._tokenizer), self._model.config.get_text_config().vocab_size)
        for i in range(2):
            prompt = [mix_seed(i, j, 0x9B0B) % vocab for j in range(min(16, self.context // 2))]
            budget = min(_PROBE_TOKENS, self.context - len(prompt))
            body = request_body(
                prompt,
                Sampling(budget),
                budget=budget,
                seed=i,
                eos=frozenset(),
                salt=replica.tag,
                adapter=self._weights.how == "adapter",
            )
            ids: list[int] = []
            logprobs: list[float] = []
            async with replica.server.stream(body) as chunks:
                async for chunk in chunks:
                    ids += chunk.ids
                    logprobs += chunk.logprobs
            if len(ids) != budget:
                raise ServerLost(f"{replica.server.url} gave {len(ids)} of {budget} tokens when it was probed")
            own = await asyncio.to_thread(self._weights.logprobs, [*prompt, *ids], len(prompt))
            gap = max(abs(a - b) for a, b in zip(logprobs, own, strict=True))
            self.largest_gap = max(self.largest_gap, gap)
            if not gap <= self._tolerance:
                raise ProbeMismatch(
                    f"after the update to version {self._version}, log-probs of {replica.server.url} differ from the "
                    f"learner's by {gap:.3g}, more than engine.probe_tolerance allows ({self._tolerance:g}): the "
                    f"server does not run the new weights (engine.weight_sync is {self._weights.how})"
                )


async def _end(task: asyncio.Task[Any]) -> None:
    """Cancel and wait; its failure has been told or does not matter any more."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()
