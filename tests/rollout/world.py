"""A small world for rollout tests: tokenizer, protocol, real rewards, a real interpreter, scripted or real models."""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections import Counter
from types import TracebackType
from typing import Any, Self

from retool.config import Recipe
from retool.models import tiny_tokenizer
from retool.protocols import Codec, build_protocol
from retool.records import Problem
from retool.rollout.episode import Episode, EpisodeSettings
from sandbox.types import ExceptionInfo, ExecResult, Limits, SandboxError, SandboxUnavailable, Status, Usage


def recipe(**sections: Any) -> Recipe:
    """Small and fast; sections as dictionaries are merged over this."""
    base: dict[str, Any] = {
        "seed": 3,
        "model": {"tiny": {"context": 512}},
        "protocol": {"fence": False, "boxed": False, "instructions": ""},
        "reward": {"verifier": "exact"},
        "rollout": {"prompts": 2, "group_size": 2, "max_turns": 3, "max_tokens": 200, "engine_retries": 2},
        "engine": {"slots": 16},
        "sandbox": {"wall_s": 5.0, "retries": 2},
    }
    for name, value in sections.items():
        base[name] = {**base[name], **value} if isinstance(value, dict) and name in base else value
    return Recipe.model_validate(base)


def codec_of(r: Recipe) -> Codec:
    return Codec(tiny_tokenizer(), build_protocol(r.protocol))


def problem(prompt: str = "What is 6*7?", answer: str = "42", id: str = "p0") -> Problem:
    return Problem(id, prompt, answer, family="product", meta={"level": 1})


class PythonBox:
    """Runs code in a fresh Python process. `faults`: errors raised instead of, or `lost`: after, the next runs.

    As the real thing, it remembers results by idempotency key; `runs` counts what was really run.
    """

    def __init__(self) -> None:
        self.faults: list[SandboxError] = []
        self.lost = 0
        self.runs: list[str] = []
        self._known: dict[str, ExecResult] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        pass

    async def exec(
        self,
        code: str,
        *,
        stdin: str = "",
        limits: Limits | None = None,
        seed: int = 0,
        idempotency_key: str | None = None,
    ) -> ExecResult:
        if self.faults:
            raise self.faults.pop(0)
        if idempotency_key in self._known:
            return self._known[idempotency_key]
        self.runs.append(code)
        result = await _run(code, (limits or Limits()).wall_s)
        if idempotency_key is not None:
            self._known[idempotency_key] = result
        if self.lost:  # it ran, but the answer never arrived
            self.lost -= 1
            raise SandboxUnavailable("the connection broke")
        return result


async def _run(code: str, wall_s: float) -> ExecResult:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-c", code, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        out, err = await asyncio.wait_for(child.communicate(), wall_s)
    except TimeoutError:
        child.kill()
        await child.communicate()
        return ExecResult(Status.TIMEOUT)
    stdout, stderr = out.decode("utf-8", "replace"), err.decode("utf-8", "replace")
    digest = hashlib.blake2b(out, digest_size=8).hexdigest()
    if child.returncode == 0:
        return ExecResult(Status.OK, stdout, stderr, usage=Usage(wall_ms=1.0), digest=digest)
    kind, _, message = stderr.strip().rpartition("\n")[2].partition(": ")
    return ExecResult(Status.ERROR, stdout, stderr, ExceptionInfo(kind, message, stderr), exit_code=child.returncode)


async def play(engine: Any, box: Any, r: Recipe, task: Problem | None = None, tool: bool = True) -> tuple[Any, Counter]:
    """One episode; (trajectory, counters)."""
    counters: Counter[str] = Counter()
    codec = codec_of(r)
    settings = EpisodeSettings.of(r, codec, tool)
    episode = Episode.start(
        engine, box, codec, settings, counters, id="0.0.0", problem=task or problem(), group="0.0", index=0, seed=11
    )
    return await episode.run(), counters
