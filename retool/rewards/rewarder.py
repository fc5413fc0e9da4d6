"""`Rewarder`: one trajectory in, its `RewardResult` out.

Only what the policy wrote is read (`Trajectory.policy_text`), without observation blocks that it forged: a box in a
tool's output, in the prompt or in a forged observation scores nothing. A wrong answer never outscores a right one,
because costs are subtracted from right answers only and are capped below their lead (`RewardConfig` checks that).
"""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from retool.config import RewardConfig
from retool.errors import UserError
from retool.protocols.base import ToolProtocol
from retool.records import RewardResult, Trajectory
from retool.rewards.normal import LONGEST, normal, quick_verdict
from retool.rewards.pool import WorkerPool

CustomReward = Callable[[Trajectory, RewardResult], RewardResult]


def score_of(accuracy: float | None, calls: int, config: RewardConfig) -> tuple[float, dict[str, float]]:
    """(score, its parts) of an accuracy and a number of tool calls; 0 when the accuracy is unknown."""
    if accuracy is None:
        return 0.0, {}
    if accuracy < 1:
        return config.wrong, {"answer": config.wrong}
    cost = min(config.call_cost * calls, config.max_call_cost)
    return config.correct - cost, {"answer": config.correct, "calls": -cost}


class Rewarder:
    """Used as `async with`: verifier processes live as long as the block. Sets nothing on the trajectory."""

    def __init__(self, config: RewardConfig, protocol: ToolProtocol) -> None:
        self._config = config
        self._protocol = protocol
        self._own: Counter[str] = Counter()
        self._custom = _load(config.custom) if config.custom else None
        self._stack = AsyncExitStack()
        self.pool = WorkerPool(config.workers, config.timeout_s, config.retries) if config.verifier == "math" else None

    @property
    def counters(self) -> dict[str, int]:
        """How often what happened: scored, unknown, forged, no_answer, multi_boxed, killed_workers, restarts, ..."""
        names = ("scored", "unknown", "forged", "no_answer", "multi_boxed", "killed_workers", "restarts")
        pool = self.pool.counters if self.pool is not None else Counter[str]()
        return {**dict.fromkeys(names, 0), **self._own, **pool}

    async def __aenter__(self) -> Self:
        if self.pool is not None:
            await self._stack.enter_async_context(self.pool)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def score(self, trajectory: Trajectory) -> RewardResult:
        """Accuracy 1, 0 or None (unknown: drop it, count it, never train on it)."""
        result = await self._score(trajectory)
        if self._custom is not None:
            result = _checked(self._custom(trajectory, result), self._config.custom or "")
        self._own["scored"] += 1
        self._own["unknown"] += result.accuracy is None
        return result

    async def _score(self, trajectory: Trajectory) -> RewardResult:
        if trajectory.status == "aborted":
            return RewardResult(None, 0.0, flags=("aborted",), verifier="none")
        flags: list[str] = []
        text = trajectory.policy_text
        if self._protocol.forged(text):
            flags.append("obs_forgery")
            self._own["forged"] += 1
            text = self._protocol.strip_forged(text)
        accuracy, verifier, answer = await self._accuracy(trajectory.problem.answer, text, flags)
        score, parts = score_of(accuracy, len(trajectory.tool_calls), self._config)
        shown = answer if answer is None else answer[:LONGEST]
        return RewardResult(accuracy, score, parts, tuple(flags), verifier, shown)

    async def _accuracy(self, gold: str, text: str, flags: list[str]) -> tuple[float | None, str, str | None]:
        """(accuracy, who decided, the answer read). Adds to `flags`."""
        candidates = self._protocol.candidates(text)
        if not candidates:
            flags.append("no_answer")
            self._own["no_answer"] += 1
            return 0.0, "format", None
        answer = candidates[-1]
        if len({normal(c) for c in candidates}) > 1:
            flags.append("multi_boxed")
            self._own["multi_boxed"] += 1
            return 0.0, "format", answer
        if self.pool is None:
            return float(answer.strip() == gold.strip()), "exact", answer
        verdict = quick_verdict(gold, answer)
        if verdict is not None:
            return float(verdict), "math:quick", answer
        verdict = await self.pool.grade(gold, answer)
        if verdict is None:
            flags.append("unverifiable")
        return (None if verdict is None else float(verdict)), "math", answer


def _load(path: str) -> CustomReward:
    """The function behind `module:function`. Raises `UserError`."""
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"reward.custom: cannot load {path!r} ({error}); write it as package.module:function"
        ) from error
    if not callable(function):
        raise UserError(f"reward.custom: {path!r} is not a function")
    loaded: CustomReward = function
    return loaded


def _checked(result: object, path: str) -> RewardResult:
    if not isinstance(result, RewardResult):
        raise UserError(f"reward.custom: {path!r} returned {type(result).__name__}, not a RewardResult")
    if not math.isfinite(result.score) or (result.accuracy is not None and not 0 <= result.accuracy <= 1):
        raise UserError(f"reward.custom: {path!r} returned score {result.score} and accuracy {result.accuracy}")
    return result
