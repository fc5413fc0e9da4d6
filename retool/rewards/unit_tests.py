"""The answer is a program: run it on the problem's tests in the sandbox, compare its output here (A §2.3).

What enters the sandbox is the program and the input of one test, in a fresh state each; expected outputs never do. A
program passes a test when it ends well and every line of its output is right, so that stopping early, printing nothing
or printing a beginning fails. What the machine breaks is unknown, never wrong.

A function (`fn_name`) is called by a few lines behind the program, which print its result as JSON behind a marker that
is new for every run. The program shares a process with those lines and could read the marker, so a result is not proof
that the function computed it; but it can only print what it knows, and it does not know what is expected.
"""

from __future__ import annotations

import asyncio
import json
import random
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from retool.config.reward import UnitTestsConfig
from retool.errors import UserError
from retool.records import Problem
from retool.rewards.cases import Case, cases_of, same_output, same_value
from sandbox.types import (
    ConfinementUnavailable,
    ExecResult,
    Limits,
    Sandbox,
    SandboxError,
    SandboxOverloaded,
    Status,
)

_RETRY_S = 0.05
_LONGEST_EXPECTED = 8 << 20  # bytes of output worth comparing
_CALL = """

import json as _json, sys as _sys
_arguments = _json.loads(_sys.stdin.read())
_function = getattr(Solution(), {name!r}) if "Solution" in globals() and hasattr(Solution, {name!r}) else {name}
_sys.stdout.write("\\n" + {marker!r} + _json.dumps(_function(*_arguments)) + "\\n")
_sys.stdout.flush()
"""


@dataclass(frozen=True)
class Passed:
    """`passed` of `ran` tests, None when the sandbox failed; `reason` says how the first failing test ended."""

    passed: int | None
    ran: int
    reason: str = ""


class TestRunner:
    """Runs programs against problems; counts runs, retries and failures of the machine in `counters`."""

    __test__ = False  # not one of pytest's

    def __init__(self, config: UnitTestsConfig, sandbox: Sandbox, counters: Counter[str]) -> None:
        self._config = config
        self._sandbox = sandbox
        self._counters = counters
        self._gate = asyncio.Semaphore(config.concurrency)
        self._limits = Limits(wall_s=config.wall_s, cpu_s=config.cpu_s, memory_mb=config.memory_mb)

    async def run(self, problem: Problem, program: str) -> Passed:
        """All-or-nothing stops at the first test that fails; `fraction` runs them all."""
        cases = cases_of(problem)[: self._config.max_tests]
        passed, reason = 0, ""
        for case in cases:
            verdict, how = await self._run(case, program)
            if verdict is None:
                return Passed(None, passed, how)
            passed += verdict
            if not verdict:
                reason = reason or how
                if not self._config.fraction:
                    break
        return Passed(passed, len(cases), reason)

    async def _run(self, case: Case, program: str) -> tuple[bool | None, str]:
        marker = f"result-{secrets.token_hex(16)}:"
        code = program + _CALL.format(name=case.function, marker=marker) if case.function else program + "\n\npass\n"
        try:
            result = await self._exec(code, case)
        except SandboxError as error:
            self._counters["test_infra_failures"] += 1
            return None, f"sandbox: {type(error).__name__}: {error}"
        self._counters["tests_run"] += 1
        if result.status is Status.CANCELLED:
            return None, "cancelled"
        if not result.ok:
            return False, result.status.value
        if result.truncated:
            return False, "too much output"
        right = (
            _value_is(case, result.stdout, marker, self._config)
            if case.function
            else (same_output(case.expected, result.stdout, self._config.tolerance))
        )
        return right, "" if right else "wrong output"

    async def _exec(self, code: str, case: Case) -> ExecResult:
        """One run, tried again after failures of the machine. Raises `SandboxError` after the last."""
        size = len(case.expected.encode("utf-8", "replace")) if isinstance(case.expected, str) else 0
        if size > _LONGEST_EXPECTED:
            raise UserError(f"an expected output has {size} bytes; at most {_LONGEST_EXPECTED} can be compared")
        limits = _with_room(self._limits, size)
        for attempt in range(self._config.retries + 1):
            try:
                async with self._gate:
                    return await self._sandbox.exec(code, stdin=case.given, limits=limits, profile=self._config.profile)
            except ConfinementUnavailable:
                raise
            except SandboxError as failure:
                if not failure.retryable or attempt == self._config.retries:
                    raise
                self._counters["test_retries"] += 1
                pause = _RETRY_S * 2**attempt * random.uniform(0.5, 1.5)
                if isinstance(failure, SandboxOverloaded):
                    pause = max(pause, failure.retry_after)
            await asyncio.sleep(min(pause, 5.0))
        raise AssertionError("the last try returns or raises")


def _with_room(limits: Limits, expected: int) -> Limits:
    """Keep more output than is expected, so that what is cut off is certainly too much."""
    head = max(limits.output_head_bytes, 2 * expected + 4096)
    return Limits(
        wall_s=limits.wall_s,
        cpu_s=limits.cpu_s,
        memory_mb=limits.memory_mb,
        output_head_bytes=head,
        output_kill_bytes=max(limits.output_kill_bytes, 2 * head),
    )


def _value_is(case: Case, stdout: str, marker: str, config: UnitTestsConfig) -> bool:
    """The value behind the last marker; what the program printed itself does not count."""
    _, found, rest = stdout.rpartition(marker)
    if not found:
        return False
    try:
        given = json.loads(rest.partition("\n")[0])
    except (json.JSONDecodeError, RecursionError):
        return False
    return same_value(case.expected, given, config.tolerance)


def verdict(outcome: Passed, config: UnitTestsConfig) -> tuple[float | None, float]:
    """(accuracy: all passed, quality: the share that passed with `fraction`)."""
    if outcome.passed is None:
        return None, 0.0
    share = outcome.passed / outcome.ran
    whole = float(outcome.passed == outcome.ran)
    return whole, share if config.fraction else whole


def outputs_of(problem: Problem) -> Sequence[str]:
    """Expected outputs as text, for detectors of hard-coded tables; they stay in this process."""
    return [c.expected if isinstance(c.expected, str) else json.dumps(c.expected) for c in cases_of(problem)]
