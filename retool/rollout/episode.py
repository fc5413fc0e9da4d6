"""One trajectory as one coroutine: generate, run the call, show the result, go on (spec A, appendix A.1).

A failure of the model's code is an observation. A failure of ours (engine, sandbox) is retried under the same key and
then aborts the trajectory: it is never scored.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from retool.config import Recipe
from retool.engines.base import Completion, Engine, EngineError, Sampling, Session
from retool.engines.sampler import mix_seed
from retool.protocols.base import Call, Malformed
from retool.protocols.codec import Codec
from retool.records import Problem, ToolCall, Trajectory, TrajectoryStatus
from retool.rollout import observation
from retool.transcript import Span, Transcript
from sandbox.types import ConfinementUnavailable, ExecResult, Limits, Sandbox, SandboxError, SandboxOverloaded

FORGED = "obs_forgery"
VOID = "void_turn"


@dataclass(frozen=True)
class EpisodeSettings:
    """Limits of an episode. `max_tokens`: after the prompt, observations included. `scope`: names the run in
    idempotency keys. `retry_s`: first pause before a retry, doubled every time."""

    max_turns: int
    max_tokens: int
    sampling: Sampling
    limits: Limits = field(default_factory=Limits)
    observation_chars: int = 400
    sandbox_retries: int = 3
    engine_retries: int = 2
    retry_s: float = 0.05
    scope: str = "run"

    @classmethod
    def of(cls, recipe: Recipe, codec: Codec, tool: bool, sampling: Sampling | None = None) -> EpisodeSettings:
        """What a recipe says; `tool=False` bans the string that opens a call, and nothing ends one."""
        rollout, box = recipe.rollout, recipe.sandbox
        sampling = sampling or Sampling(rollout.max_tokens, rollout.temperature, rollout.top_p, rollout.top_k)
        banned = sampling.banned if tool else (*sampling.banned, codec.protocol.call_open)
        return cls(
            max_turns=rollout.max_turns,
            max_tokens=min(rollout.max_tokens, sampling.max_tokens),
            sampling=replace(sampling, stop=codec.protocol.stop if tool else (), banned=banned),
            limits=Limits(wall_s=box.wall_s, cpu_s=box.cpu_s, memory_mb=box.memory_mb),
            observation_chars=rollout.observation_chars,
            sandbox_retries=box.retries,
            engine_retries=rollout.engine_retries,
            scope=f"{recipe.name}-{recipe.seed}",
        )


class _Aborted(Exception):
    """Our fault; the trajectory ends and is dropped."""


@dataclass
class Episode:
    """Runs one trajectory; `counters` gathers retries, malformed, forged, calls."""

    engine: Engine
    sandbox: Sandbox
    codec: Codec
    settings: EpisodeSettings
    counters: Counter[str]
    trajectory: Trajectory
    _session: Session | None = field(default=None, init=False)

    @classmethod
    def start(
        cls,
        engine: Engine,
        sandbox: Sandbox,
        codec: Codec,
        settings: EpisodeSettings,
        counters: Counter[str],
        *,
        id: str,
        problem: Problem,
        group: str,
        index: int,
        seed: int,
    ) -> Episode:
        prompt = Span("prompt", codec.prompt_ids(problem))
        trajectory = Trajectory(id, problem, group, index, seed, Transcript([prompt]))
        return cls(engine, sandbox, codec, settings, counters, trajectory)

    async def run(self) -> Trajectory:
        """Play it to its end. Raises only for bugs and for a machine that cannot confine code."""
        began = time.monotonic()
        record = self.trajectory
        try:
            record.status = await self._play()
        except _Aborted as error:
            record.status, record.error = "aborted", str(error)
            self.counters["infra_failures"] += 1
        finally:
            if self._session is not None:
                await self._session.close()
        spans = record.transcript.policy_spans
        record.policy_text = "".join(self.codec.decode(s.ids) for s in spans)
        if self.codec.protocol.forged(record.policy_text):
            self._flag(FORGED)
            self.counters["forged"] += 1
        record.seconds = time.monotonic() - began
        return record

    async def _play(self) -> TrajectoryStatus:
        transcript, settings = self.trajectory.transcript, self.settings
        context = self.engine.capabilities.context
        end = transcript.prompt_len + settings.max_tokens
        if transcript.prompt_len >= context:
            raise _Aborted(
                f"the prompt of problem {self.trajectory.problem.id!r} has {transcript.prompt_len} tokens, the "
                f"engine's context {context}; drop the problem or raise engine.context"
            )
        end = min(end, context)
        for turn in range(settings.max_turns):
            completion = await self._generate(turn, end - len(transcript))
            text = self.codec.decode(completion.ids)
            call = self.codec.protocol.parse(text) if completion.finish == "stop" else None
            self._record(turn, completion, call)
            if not isinstance(call, Call) and self.codec.protocol.answer(text) is None:
                self._flag(VOID)
            if completion.finish == "length":
                return "truncated_length"
            if call is None:
                return "finished"
            if turn + 1 >= settings.max_turns:
                return "truncated_turns"  # nobody could read the result: the call is not run
            if len(transcript) + 1 >= end:
                return "truncated_tool"  # no result fits, however short: the call is not run
            tool_call = await self._answer(turn, call)
            self.trajectory.tool_calls.append(tool_call)
            shown = self.codec.observation_ids(tool_call.observation, transcript.ids)
            if len(transcript) + len(shown) >= end:
                return "truncated_tool"
            transcript.append(Span("tool", shown, turn=turn, kind="observation"))
            await self._append(shown)
        raise AssertionError("the last turn returns")

    def _record(self, turn: int, completion: Completion, call: Call | Malformed | None) -> None:
        code = None
        if call is not None:
            code = self.codec.token_range(completion.ids, call.start, call.end)
        self.trajectory.transcript.append(
            Span(
                "policy",
                completion.ids,
                turn=turn,
                logprobs=completion.logprobs,
                versions=completion.versions,
                code=code,
                digest=completion.digest,
            )
        )

    def _flag(self, flag: str) -> None:
        if flag not in self.trajectory.flags:
            self.trajectory.flags = (*self.trajectory.flags, flag)

    # -- the engine --------------------------------------------------------------------------------------------------

    async def _generate(self, turn: int, room: int) -> Completion:
        """One turn; a failed one is asked for again, on a new session with the same ids and the same seed."""
        sampling = replace(self.settings.sampling, max_tokens=room)
        error: EngineError | None = None
        for attempt in range(self.settings.engine_retries + 1):
            try:
                session = await self._open()
                return await session.generate(sampling)
            except EngineError as failure:
                error = failure
                await self._close()
                if not failure.retryable:
                    break
                if attempt < self.settings.engine_retries:
                    self.counters["engine_retries"] += 1
                    await self._pause(attempt)
        raise _Aborted(f"engine, turn {turn}: {type(error).__name__}: {error}")

    async def _open(self) -> Session:
        if self._session is None:
            self._session = await self.engine.open(self.trajectory.transcript.ids, self.trajectory.seed)
        return self._session

    async def _close(self) -> None:
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()

    async def _append(self, ids: Sequence[int]) -> None:
        """The transcript already holds them: a session that fails here is replaced by the next turn's."""
        try:
            if self._session is not None:
                await self._session.append(ids)
        except EngineError:
            self.counters["engine_retries"] += 1
            await self._close()

    # -- the sandbox -------------------------------------------------------------------------------------------------

    async def _answer(self, turn: int, call: Call | Malformed) -> ToolCall:
        chars = self.settings.observation_chars
        if isinstance(call, Malformed):
            self.counters["malformed"] += 1
            return ToolCall(turn, "", "malformed", observation.malformed(call.reason, chars))
        result = await self._execute(turn, call.code)
        self.counters["calls"] += 1
        self.counters[f"calls_{result.status.value}"] += 1
        return ToolCall(
            turn,
            call.code,
            result.status.value,
            observation.render(result, chars, self.settings.limits),
            queue_ms=result.usage.queue_ms,
            run_ms=result.usage.wall_ms,
            digest=result.digest,
        )

    async def _execute(self, turn: int, code: str) -> ExecResult:
        """Run code; our failures are retried with one idempotency key, so an effect happens once."""
        digest = hashlib.blake2b(code.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        key = f"{self.settings.scope}/{self.trajectory.id}/{turn}/{digest}"
        seed = mix_seed(self.trajectory.seed, turn)
        error: SandboxError | None = None
        for attempt in range(self.settings.sandbox_retries + 1):
            try:
                return await self.sandbox.exec(code, limits=self.settings.limits, seed=seed, idempotency_key=key)
            except ConfinementUnavailable:
                raise
            except SandboxError as failure:
                error = failure
                if not failure.retryable:
                    break
                if attempt < self.settings.sandbox_retries:
                    self.counters["sandbox_retries"] += 1
                    await self._pause(attempt, failure)
        raise _Aborted(f"sandbox, turn {turn}: {type(error).__name__}: {error}")

    async def _pause(self, attempt: int, failure: SandboxError | None = None) -> None:
        """Doubling pause with jitter, at most 5 s; the sandbox may name its own."""
        pause = self.settings.retry_s * 2**attempt * random.uniform(0.5, 1.5)
        if isinstance(failure, SandboxOverloaded):
            pause = max(pause, failure.retry_after)
        await asyncio.sleep(min(pause, 5.0))
