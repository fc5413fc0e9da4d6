"""The embedded engine: continuous batching over a transformers causal LM, on CPU or one GPU.

Sessions are rows over a slot cache (`slot_cache.py`). A scheduler task hands bursts of decode ticks to one worker
thread; between bursts, on the event loop, it takes in new turns, cancellations, forks and weight updates, so nothing
is shared between threads and nothing is locked.

With `lockstep=True` rounds replace continuous batching: a round starts when every open session waits in `generate` or
is closed, and runs until every turn of it ended. Shapes then never depend on how long a tool took: equal weights and
seeds give equal bits.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from retool.engines.base import Completion, ContextOverflow, EngineCapabilities, EngineError, Sampling
from retool.engines.burst import Burst
from retool.engines.forward import Forward, probe
from retool.engines.rows import Inside, Row, Turn
from retool.engines.sampler import mix_seed
from retool.engines.text import Bans, Pieces


class TransformersSession:
    """One trajectory of a `TransformersEngine`; see `retool.engines.base.Session`."""

    def __init__(self, engine: TransformersEngine, row: Row) -> None:
        self._engine = engine
        self._row = row

    @property
    def ids(self) -> tuple[int, ...]:
        """Everything so far."""
        return tuple(self._row.ids)

    async def generate(self, sampling: Sampling, deadline: float | None = None) -> Completion:
        return await self._engine._generate(self._row, sampling, deadline)

    async def append(self, ids: Sequence[int]) -> None:
        self._engine._append(self._row, ids)

    async def fork(self, n: int) -> list[TransformersSession]:
        return [TransformersSession(self._engine, row) for row in await self._engine._fork(self._row, n)]

    async def close(self) -> None:
        self._engine._close_row(self._row)


class TransformersEngine:
    """`retool.engines.base.Engine` over `model` (a transformers causal LM in eval mode) and its tokenizer.

    `slots`: trajectories whose keys and values are kept; further turns wait in order of arrival. `context`: tokens in
    one trajectory, default what the model allows. `shared_weights`: the learner changes `model` in place and then
    calls `sync(None, version)`; otherwise the engine works on a private copy and `sync` brings the weights.
    Raises `ModelNotSupported` when the model cannot be run over slots.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        slots: int = 64,
        context: int | None = None,
        lockstep: bool = False,
        shared_weights: bool = True,
    ) -> None:
        if slots < 1:
            raise ValueError(f"slots must be >= 1, got {slots}")
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if context is None and longest is None:
            raise ValueError("the model does not say how long its context is; set engine.context")
        if context is not None and longest is not None and context > longest:
            raise ValueError(f"engine.context is {context}, but the model knows only {longest} positions")
        self.lockstep = lockstep
        self.context = int(context if context is not None else longest)
        self._shared = shared_weights
        self._model = (model if shared_weights else copy.deepcopy(model)).eval()
        self._forward = Forward(self._model, slots, self.context)
        probe(self._forward)
        self._pieces = Pieces(tokenizer, model.config.get_text_config().vocab_size)
        self._eos = _eos_ids(model, tokenizer)
        self._bans: dict[tuple[tuple[str, ...], bool], Bans] = {}
        self._slots: list[Row | None] = [None] * slots
        self._waiting: deque[Turn] = deque()
        self._active: list[Turn] = []
        self._jobs: deque[tuple[Callable[[], None], asyncio.Future[None]]] = deque()
        self._open: set[int] = set()
        self._expected = 0
        self._opened = itertools.count()
        self._clock = 0
        self._version = 0
        self._task: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="retool-engine")
        self._burst = Burst(self._forward, self._eos)
        self._counts = {"prefilled": 0, "replayed": 0, "decoded": 0, "evicted": 0}
        self._closed = False

    # -- the engine's surface ---------------------------------------------------------------------------------------

    @property
    def capabilities(self) -> EngineCapabilities:
        return EngineCapabilities(context=self.context, deterministic=self.lockstep, probe=True)

    @property
    def version(self) -> int:
        """Policy version of the weights in use."""
        return self._version

    def stats(self) -> dict[str, int]:
        """Counters: `prefilled` (prompt and observation tokens fed), `replayed` (fed again because their keys were
        dropped), `decoded` (sampled), `ticks`, `passes`, `evicted`, `open`."""
        return {
            **self._counts,
            "ticks": self._burst.ticks,
            "passes": self._forward.passes,
            "open": len(self._open),
        }

    def expect(self, n: int) -> None:
        """Lockstep: `n` sessions will be opened before the first round of a new wave. Also forgets the cache, so a
        wave's shapes depend on the wave alone. Raises `EngineError` while sessions are open."""
        if self._open:
            raise EngineError(f"a new wave was announced while {len(self._open)} sessions are open")
        if self.lockstep and n > len(self._slots):
            raise ValueError(f"a lockstep wave of {n} sessions needs as many slots; there are {len(self._slots)}")
        self._expected = n
        self._opened = itertools.count()
        if self.lockstep:
            self._forward.cache.release()

    async def open(self, prompt_ids: Sequence[int], seed: int) -> TransformersSession:
        if self._closed:
            raise EngineError("the engine is closed")
        if not prompt_ids:
            raise ValueError("a prompt needs at least one token")
        if len(prompt_ids) >= self.context:
            raise ContextOverflow(f"a prompt of {len(prompt_ids)} tokens leaves no room in {self.context}")
        row = Row.new(seed, (next(self._opened),), list(prompt_ids), self._pieces)
        self._expected = max(0, self._expected - 1)
        self._open.add(id(row))
        return TransformersSession(self, row)

    async def sync(self, weights: Mapping[str, Any] | None, version: int) -> None:
        """New weights between two ticks; all cached keys and values are forgotten, running turns go on with the new
        version. Raises `EngineError` when weights are missing or do not fit."""
        if weights is None and not self._shared:
            raise EngineError("this engine has its own copy of the weights: sync needs them")

        def swap() -> None:
            if weights is not None:
                try:
                    self._model.load_state_dict(weights, strict=True)
                except RuntimeError as error:
                    raise EngineError(f"the weights do not fit the engine's model: {error}") from error
            self._model.eval()
            self._version = version
            for row in self._slots:
                if row is not None:
                    row.cached = 0
            if not self._open:
                self._forward.cache.release()
            for turn in self._active:
                self._count_feed(turn.row)

        await self._between_bursts(swap)

    async def close(self) -> None:
        """Fail what is pending and stop the worker thread; idempotent."""
        self._closed = True
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task])
        self._fail_all(EngineError("the engine was closed"))
        self._thread.shutdown(wait=True)
        self._forward.cache.release()

    # -- what sessions call -----------------------------------------------------------------------------------------

    async def _generate(self, row: Row, sampling: Sampling, deadline: float | None) -> Completion:
        if row.closed or self._closed:
            raise EngineError("the session is closed")
        if row.turn is not None:
            raise EngineError("the session is already generating")
        budget = min(sampling.max_tokens, self.context - len(row.ids))
        if budget < 1:
            raise ContextOverflow(f"the trajectory has {len(row.ids)} tokens, no room in {self.context}")
        early = self._ban((*sampling.banned, *sampling.stop), True) if sampling.min_tokens else None
        bans = self._ban(sampling.banned, False) if sampling.banned else None
        keep = max((len(s) for s in (*sampling.stop, *sampling.banned)), default=1)
        turn = Turn(row, sampling, budget, deadline, asyncio.get_running_loop().create_future(), bans, early, keep)
        turn.start, turn.tail = len(row.ids), row.tail.copy()
        if sampling.probe is not None:
            turn.code = Inside(self._pieces, sampling.probe.opens, sampling.probe.closes)
        row.turn = turn
        self._waiting.append(turn)
        if not self.lockstep:
            self._burst.interrupt()  # join between two ticks
        self._kick()
        alarm = None
        if deadline is not None:
            alarm = asyncio.get_running_loop().call_later(max(0.0, deadline - time.monotonic()), self._wake)
        try:
            return await turn.future
        except asyncio.CancelledError:
            turn.abandoned = True
            self._wake()
            raise
        finally:
            if alarm is not None:
                alarm.cancel()

    def _append(self, row: Row, ids: Sequence[int]) -> None:
        if row.closed:
            raise EngineError("the session is closed")
        if row.turn is not None:
            raise EngineError("tokens cannot be appended while the session generates")
        if len(row.ids) + len(ids) > self.context:
            raise ContextOverflow(f"{len(row.ids)} + {len(ids)} tokens do not fit into {self.context}")
        row.ids.extend(ids)
        row.foreign.extend(b"\1" * len(ids))
        if ids:
            row.tail = type(row.tail)(self._pieces)

    async def _fork(self, row: Row, n: int) -> list[Row]:
        if row.closed or row.turn is not None:
            raise EngineError("only an open session that is not generating can be forked")
        row.forks += 1
        made = [row.branch(mix_seed(row.seed, row.forks, i), (*row.key, row.forks, i)) for i in range(n)]
        self._open.update(id(r) for r in made)

        def copy_slots() -> None:
            for child in made:
                if row.slot is not None and not child.closed and self._take_slot(child):
                    assert child.slot is not None
                    self._forward.cache.copy_slot(row.slot, child.slot, row.cached)
                    child.cached = row.cached

        if not self.lockstep:  # in lockstep slots are given out at the barrier, in order
            await self._between_bursts(copy_slots)
        return made

    def _close_row(self, row: Row) -> None:
        if row.closed:
            return
        row.closed = True
        self._open.discard(id(row))
        if row.turn is not None:
            row.turn.abandoned = True
            self._burst.interrupt()
        elif row.slot is not None and not self._burst.running:
            self._drop_slot(row)
        elif self._waiting and not self.lockstep:
            self._burst.interrupt()  # its slot is wanted
        self._kick()

    # -- scheduling (event loop only) -------------------------------------------------------------------------------

    def _ban(self, strings: tuple[str, ...], with_eos: bool) -> Bans:
        key = (tuple(dict.fromkeys(strings)), with_eos)
        if key not in self._bans:
            tokens = self._eos if with_eos else frozenset()
            self._bans[key] = Bans(self._pieces, key[0], tokens, self._forward.device)
        return self._bans[key]

    def _wake(self) -> None:
        """Have the scheduler look at all turns soon."""
        self._burst.interrupt()
        self._kick()

    def _kick(self) -> None:
        if not self._closed and (self._task is None or self._task.done()) and (self._waiting or self._jobs):
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def _between_bursts(self, job: Callable[[], None]) -> None:
        """Run `job` in the worker thread while no tick runs."""
        if self._closed:
            raise EngineError("the engine is closed")
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._jobs.append((job, done))
        self._burst.interrupt()
        self._kick()
        await done

    async def _run(self) -> None:
        """Serve until nothing can be done; a later call starts it again."""
        try:
            while await self._serve():
                pass
        except asyncio.CancelledError:
            self._fail_all(EngineError("generation was cancelled with its event loop"))
            raise
        except Exception as error:
            failure = error if isinstance(error, EngineError) else EngineError(f"a forward pass failed: {error!r}")
            self._fail_all(failure)

    async def _serve(self) -> bool:
        """One burst, or False when there is nothing to do."""
        self._burst.arm()
        while self._jobs:
            job, done = self._jobs.popleft()
            try:
                await self._in_thread(job)
            except Exception as error:
                if not done.done():
                    done.set_exception(error)
            else:
                if not done.done():
                    done.set_result(None)
        self._sweep()
        self._admit()
        if not self._active:
            return bool(self._jobs)
        threads = torch.get_num_threads()
        turns, version = list(self._active), self._version
        limit = min((t.deadline for t in turns if t.deadline is not None), default=None)
        self._counts["decoded"] += await self._in_thread(
            lambda: self._burst.run(turns, self._slots, version, limit, threads)
        )
        self._sweep()
        await asyncio.sleep(0)  # let finished episodes hand in what comes next
        return True

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        """Run in the worker; when the task is cancelled meanwhile, wait for the current tick: state is never shared."""
        self._burst.running = True
        future = self._thread.submit(work)
        wrapped: Awaitable[Any] = asyncio.wrap_future(future)
        try:
            return await wrapped
        except asyncio.CancelledError:
            self._burst.interrupt()
            if not future.cancelled():
                future.exception()
            raise
        finally:
            self._burst.running = False

    def _sweep(self) -> None:
        """Hand out what ended, undo what was abandoned or ran out of time, free the slots of closed sessions."""
        now = time.monotonic()
        for turn in [*self._active, *self._waiting]:
            if not turn.done and not turn.abandoned:
                self._burst.check_deadline(turn, now)
            if turn.done or turn.abandoned:
                self._settle(turn)
        self._active = [t for t in self._active if t.row.turn is t]
        self._waiting = deque(t for t in self._waiting if t.row.turn is t)
        for row in list(self._slots):
            if row is not None and row.closed and row.turn is None:
                self._drop_slot(row)

    def _settle(self, turn: Turn) -> None:
        turn.row.turn = None
        if turn.finish is None or turn.abandoned:
            turn.undo()
            error = turn.error or EngineError("the session was closed while it generated")
            if not turn.future.done():
                turn.future.set_exception(error)
        elif not turn.future.done():
            turn.future.set_result(turn.completion())
        else:
            turn.undo()

    def _admit(self) -> None:
        """Waiting turns get slots, first come first served; in lockstep all at once and only at the barrier."""
        if self.lockstep:
            if self._active or self._expected or not self._waiting or len(self._waiting) < len(self._open):
                return
            self._waiting = deque(sorted(self._waiting, key=lambda t: t.row.key))
        while self._waiting:
            row = self._waiting[0].row
            if not self._take_slot(row) and not (self._evict() and self._take_slot(row)):
                break
            turn = self._waiting.popleft()
            self._clock += 1
            row.used_at = self._clock
            self._count_feed(row)
            self._active.append(turn)

    def _take_slot(self, row: Row) -> bool:
        if row.slot is None:
            number = row.key[0] if self.lockstep and len(row.key) == 1 else None
            if number is None or number >= len(self._slots) or self._slots[number] is not None:
                number = next((i for i, r in enumerate(self._slots) if r is None), None)
            if number is None:
                return False
            self._slots[number], row.slot, row.cached = row, number, 0
        return True

    def _drop_slot(self, row: Row) -> None:
        assert row.slot is not None
        self._slots[row.slot] = None
        row.slot, row.cached = None, 0

    def _evict(self) -> bool:
        """Take the slot of the session that has been idle longest, only when otherwise nobody could go on."""
        if self._active:
            return False
        idle = [r for r in self._slots if r is not None and r.turn is None]
        if not idle:
            return False
        self._drop_slot(min(idle, key=lambda r: r.used_at))
        self._counts["evicted"] += 1
        return True

    def _count_feed(self, row: Row) -> None:
        self._counts["replayed"] += max(0, row.fed - row.cached)
        self._counts["prefilled"] += sum(row.foreign[max(row.fed, row.cached) :])

    def _fail_all(self, error: EngineError) -> None:
        for turn in [*self._active, *self._waiting]:
            turn.error = turn.error or error
            turn.finish = None
            self._settle(turn)
        self._active, self._waiting = [], deque()
        for row in list(self._slots):
            if row is not None:
                self._drop_slot(row)
        while self._jobs:
            _, done = self._jobs.popleft()
            if not done.done():
                done.set_exception(error)


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    found: set[int] = set()
    for source in (tokenizer, getattr(model, "generation_config", None), model.config):
        value = getattr(source, "eos_token_id", None)
        found.update([value] if isinstance(value, int) else value or [])
    return frozenset(found)
