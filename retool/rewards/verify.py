"""Who decides whether an answer is right: a rule, the problem's tests, a judge, or one after the other."""

from __future__ import annotations

import hashlib
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from retool.config import RewardConfig
from retool.errors import UserError
from retool.protocols.base import ToolProtocol
from retool.records import Problem, Trajectory
from retool.rewards.cascade import judged
from retool.rewards.judge import Judge, Ruling
from retool.rewards.normal import normal, quick_verdict
from retool.rewards.pool import WorkerPool
from retool.rewards.text import last_program, without_special_tail
from retool.rewards.tripwires import answer_flags, program_flags
from retool.rewards.unit_tests import TestRunner, outputs_of, verdict
from sandbox.types import Sandbox


@dataclass(frozen=True)
class Verdict:
    """`accuracy`: 1, 0, or None when nobody could decide. `quality`: soft score in [0, 1]. `verifier`: who decided.
    `answer`: what was read as the answer."""

    accuracy: float | None
    quality: float
    verifier: str
    answer: str | None = None


class Verifier:
    """The verifier that a recipe names, with its processes and connections. Adds to `counters` and to the flags."""

    def __init__(
        self, config: RewardConfig, protocol: ToolProtocol, sandbox: Sandbox | None, counters: Counter[str]
    ) -> None:
        self._config = config
        self._protocol = protocol
        self._counters = counters
        self._stack = AsyncExitStack()
        self._instructions = protocol.instructions()
        rule = config.rule if config.verifier == "cascade" else config.verifier
        self._rule = rule if rule in ("math", "exact") else None
        self.pool = WorkerPool(config.workers, config.timeout_s, config.retries) if rule == "math" else None
        self.judge = Judge(config.judge, protocol, counters) if config.judge is not None else None
        self.tests: TestRunner | None = None
        if config.verifier == "unit_tests" and sandbox is not None:
            self.tests = TestRunner(config.tests, sandbox, counters)

    async def __aenter__(self) -> Self:
        if self._config.verifier == "unit_tests" and self.tests is None:
            raise UserError("reward.verifier=unit_tests needs a sandbox: Rewarder(config, protocol, sandbox)")
        if self.pool is not None:
            await self._stack.enter_async_context(self.pool)
        if self.judge is not None:
            await self._stack.enter_async_context(self.judge)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def verify(self, trajectory: Trajectory, text: str, flags: list[str]) -> Verdict:
        """`text`: what the policy wrote, forged observations taken out. Adds to `flags`."""
        if self.tests is not None:
            return await self._run_tests(self.tests, trajectory.problem, text, flags)
        candidates = self._protocol.candidates(text)
        if not candidates:
            flags.append("no_answer")
            self._counters["no_answer"] += 1
            return Verdict(0.0, 0.0, "format")
        answer = candidates[-1]
        if len({normal(c) for c in candidates}) > 1:
            flags.append("multi_boxed")
            self._counters["multi_boxed"] += 1
            return Verdict(0.0, 0.0, "format", answer)
        found = await self._decide(trajectory, answer, flags)
        problem = trajectory.problem
        right = found.accuracy == 1.0
        flags += answer_flags(problem.answer, answer, right, problem.prompt, self._instructions, self._protocol)
        return found

    async def _decide(self, trajectory: Trajectory, answer: str, flags: list[str]) -> Verdict:
        problem = trajectory.problem
        if self._rule is None:
            assert self.judge is not None
            return self._of(await self.judge.rule(problem, answer), "judge", answer, flags)
        right, who = await self._by_rule(problem.answer, answer)
        if self._config.verifier == "cascade":
            self._counters["tier_rule"] += 1
            if right or who == "math:quick":
                return Verdict(float(bool(right)), float(bool(right)), who, answer)
            assert self.judge is not None and self._config.judge is not None
            ruling, tier = await judged(self.judge, self._config.judge, right, problem, answer, self._counters)
            return self._of(ruling, tier, answer, flags)
        if right is None:
            flags.append("unverifiable")
            return Verdict(None, 0.0, who, answer)
        found = Verdict(float(right), float(right), who, answer)
        return await self._audited(found, trajectory.id, problem, answer, flags) if right else found

    async def _by_rule(self, gold: str, answer: str) -> tuple[bool | None, str]:
        if self.pool is None:
            return answer.strip() == gold.strip(), "exact"
        right = quick_verdict(gold, answer)
        return (right, "math:quick") if right is not None else (await self.pool.grade(gold, answer), "math")

    def _of(self, ruling: Ruling, tier: str, answer: str, flags: list[str]) -> Verdict:
        assert self._config.judge is not None
        flags += ruling.flags
        if ruling.score is None:
            return Verdict(None, 0.0, tier, answer)
        right = float(ruling.score > self._config.judge.threshold)
        return Verdict(right, right if self._config.judge.soft == "binary" else ruling.score, tier, answer)

    async def _audited(self, found: Verdict, id: str, problem: Problem, answer: str, flags: list[str]) -> Verdict:
        """A share of the right answers is shown to the judge as well; the lower verdict counts (A §10.3.6)."""
        judge = self._config.judge
        if self.judge is None or judge is None or _unit(id) >= judge.audit:
            return found
        self._counters["audits"] += 1
        ruling = await self.judge.rule(problem, answer)
        if ruling.score is None or ruling.unparsable or ruling.score > judge.threshold:
            return found
        self._counters["audit_disagreements"] += 1
        flags += (*ruling.flags, "audit_disagreement")
        return replace(found, accuracy=0.0, quality=0.0, verifier=f"{found.verifier}+judge")

    async def _run_tests(self, runner: TestRunner, problem: Problem, text: str, flags: list[str]) -> Verdict:
        section = self._protocol.answer(without_special_tail(text))
        program = last_program(section) if section is not None else ""
        if not program.strip():
            flags.append("no_answer")
            self._counters["no_answer"] += 1
            return Verdict(0.0, 0.0, "format")
        flags += program_flags(program, outputs_of(problem))
        outcome = await runner.run(problem, program)
        accuracy, quality = verdict(outcome, self._config.tests)
        if accuracy is None:
            flags.append("unverifiable")
        return Verdict(accuracy, quality, "unit_tests", program)


def _unit(id: str) -> float:
    """A number in [0, 1) that belongs to an id."""
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "big") / 2**64
