"""`Rewarder`: one trajectory in, its `RewardResult` out.

    verifier (accuracy, soft score) -> parts, each a pure function -> sum, clipped -> score; tripwires beside it

Only what the policy wrote is read (`Trajectory.policy_text`), without observation blocks that it forged: a box in a
tool's output, in the prompt or in a forged observation scores nothing. A wrong answer never outscores a right one as
long as `reward.right_wins` holds: costs and bonuses are bounded, and `RewardConfig` checks the bounds.
"""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from retool.config import RewardConfig
from retool.errors import UserError
from retool.protocols.base import ToolProtocol
from retool.records import RewardResult, Trajectory
from retool.rewards.normal import LONGEST
from retool.rewards.parts import Facts, clipped, parts_of, score_of, turn_penalties
from retool.rewards.shaping import POTENTIALS, Potential, turn_shaping
from retool.rewards.text import prose, without_special_tail
from retool.rewards.tripwires import FLAGS, response_flags
from retool.rewards.verify import Verdict, Verifier
from sandbox.types import Sandbox

CustomReward = Callable[[Trajectory, RewardResult], RewardResult]

__all__ = ["CustomReward", "Rewarder", "score_of"]

_COUNTED = ("scored", "unknown", "forged", "no_answer", "multi_boxed", "killed_workers", "restarts")


class Rewarder:
    """Used as `async with`: verifier processes and connections live as long as the block. Sets nothing on the
    trajectory. `sandbox`: where unit tests run; needed by `verifier: unit_tests` alone."""

    def __init__(self, config: RewardConfig, protocol: ToolProtocol, sandbox: Sandbox | None = None) -> None:
        self._config = config
        self._protocol = protocol
        self._own: Counter[str] = Counter()
        self._custom: CustomReward | None = _load(config.custom, "reward.custom") if config.custom else None
        self._potential = _potential(config)
        self._stack = AsyncExitStack()
        self._verifier = Verifier(config, protocol, sandbox, self._own)
        self.pool = self._verifier.pool

    @property
    def counters(self) -> dict[str, int]:
        """How often what happened: scored, unknown, forged, no_answer, killed_workers, ..., the verifier's tiers, and
        `flag_...` for every tripwire."""
        pool = self.pool.counters if self.pool is not None else Counter[str]()
        return {**dict.fromkeys(_COUNTED, 0), **self._own, **pool}

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self._verifier)
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
        if trajectory.problem.meta.get("canary"):
            result = _canary(result)
        self._own["scored"] += 1
        self._own["unknown"] += result.accuracy is None
        self._own.update(f"flag_{flag}" for flag in result.flags if flag in FLAGS)
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
        verdict = await self._verifier.verify(trajectory, text, flags)
        words = prose(text, self._protocol)
        flags += response_flags(words)
        return self._result(trajectory, text, words, verdict, flags)

    def _result(
        self, trajectory: Trajectory, text: str, words: str, verdict: Verdict, flags: list[str]
    ) -> RewardResult:
        shown = verdict.answer if verdict.answer is None else verdict.answer[:LONGEST]
        if verdict.accuracy is None:
            return RewardResult(None, 0.0, {}, _once(flags), verdict.verifier, shown)
        transcript, config = trajectory.transcript, self._config
        facts = Facts(
            verdict.accuracy,
            verdict.quality,
            without_special_tail(text),
            words,
            len(trajectory.tool_calls),
            transcript.n_action,
            len(transcript) - transcript.prompt_len,
            flags,
        )
        parts = parts_of(facts, config)
        turns = max(len(transcript.policy_spans), 1)
        per_turn = [0.0] * turns
        if config.turns is not None:
            penalties = turn_penalties(trajectory.tool_calls, turns, config.turns)
            parts["turns"] = math.fsum(penalties)
            per_turn = penalties
        score = clipped(sum(parts.values()), config)
        if config.shaping is not None and self._potential is not None:
            name, gamma = config.shaping.potential, config.shaping.gamma
            shaped = turn_shaping(trajectory, turns, self._potential, gamma, name)
            parts["shaping"] = 0.0 - self._potential(trajectory, 0)
            score += parts["shaping"]
            per_turn = [a + b for a, b in zip(per_turn, shaped)]
        turn_rewards: tuple[float, ...] = ()
        if config.turns is not None or config.shaping is not None:
            in_score = parts.get("turns", 0.0) + parts.get("shaping", 0.0)
            turn_rewards = (*per_turn[:-1], per_turn[-1] - in_score)
        return RewardResult(verdict.accuracy, score, parts, _once(flags), verdict.verifier, shown, turn_rewards)


def _once(flags: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(flags))


def _canary(result: RewardResult) -> RewardResult:
    """Measured, never trained on: what the verifier said stands in the parts, the reward is unknown."""
    hit = ("canary_hit",) if result.accuracy is not None and result.accuracy >= 1 else ()
    parts = {"canary": result.accuracy} if result.accuracy is not None else {}
    return replace(
        result, accuracy=None, score=0.0, parts=parts, flags=(*result.flags, "canary", *hit), turn_rewards=()
    )


def _potential(config: RewardConfig) -> Potential | None:
    if config.shaping is None:
        return None
    name = config.shaping.potential
    if name in POTENTIALS:
        return POTENTIALS[name]
    if ":" not in name:
        raise UserError(f"reward.shaping.potential: {name!r} is not one of {', '.join(POTENTIALS)} nor module:function")
    potential: Potential = _load(name, "reward.shaping.potential")
    return potential


def _load(path: str, key: str) -> Any:
    """The function behind `module:function`. Raises `UserError`."""
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{key}: cannot load {path!r} ({error}); write it as package.module:function") from error
    if not callable(function):
        raise UserError(f"{key}: {path!r} is not a function")
    return function


def _checked(result: object, path: str) -> RewardResult:
    if not isinstance(result, RewardResult):
        raise UserError(f"reward.custom: {path!r} returned {type(result).__name__}, not a RewardResult")
    if not math.isfinite(result.score) or (result.accuracy is not None and not 0 <= result.accuracy <= 1):
        raise UserError(f"reward.custom: {path!r} returned score {result.score} and accuracy {result.accuracy}")
    return result
