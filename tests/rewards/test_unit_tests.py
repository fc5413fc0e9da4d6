"""Programs as answers, run on hidden tests in the real sandbox; outputs are compared outside (appendix C 8)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from retool.config import ProblemsConfig, ProtocolConfig, RewardConfig
from retool.config.reward import UnitTestsConfig
from retool.errors import UserError
from retool.problems import load_problems
from retool.protocols import build_protocol
from retool.records import Problem, RewardResult, Trajectory
from retool.rewards import Rewarder
from retool.rewards.cases import cases_of, same_output, same_value
from retool.rewards.unit_tests import TestRunner, verdict
from retool.transcript import Transcript
from sandbox import ExecResult, Limits, LocalSandbox, SandboxUnavailable

pytestmark = pytest.mark.asyncio(loop_scope="module")

TWO_LINES = {"inputs": ["1 2\n"], "outputs": ["1\n2"]}
ADD = {"inputs": [[1, 2], [-1, 1]], "outputs": [3, [0]], "fn_name": "add"}
QUICK = UnitTestsConfig(wall_s=5, cpu_s=2, memory_mb=128)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def box() -> AsyncIterator[LocalSandbox]:
    async with LocalSandbox("py-bare", Limits(wall_s=5), workers=2) as opened:
        yield opened


def problem(**meta: Any) -> Problem:
    return Problem("p", "Print both numbers.", "", meta=meta)


async def graded(
    box: Any, program: str, meta: dict[str, Any], tests: UnitTestsConfig = QUICK
) -> tuple[RewardResult, dict[str, int]]:
    text = f"Let me think.\n<answer>\n```python\n{program}\n```\n</answer>"
    mine = Trajectory("0.0.0", problem(**meta), "0.0", 0, 0, Transcript(), policy_text=text)
    config = RewardConfig(verifier="unit_tests", tests=tests)
    async with Rewarder(config, build_protocol(ProtocolConfig(boxed=False)), box) as rewarder:
        return await rewarder.score(mine), rewarder.counters


RIGHT = {
    "prints": "a, b = input().split()\nprint(a)\nprint(b)",
    "main guard": "if __name__ == '__main__':\n    print(*input().split(), sep='\\n')",
    "blanks at line ends": "print('1  \\n2\\n\\n')",
    "exits with 0 when done": "import sys\nprint('1\\n2')\nsys.exit(0)",
}
WRONG = {
    "missing line": "print(1)",  # appendix C 8
    "nothing": "exit(0)",  # appendix C 8
    "a prefix, then os._exit(0)": "import os, sys\nprint(1)\nsys.stdout.flush()\nos._exit(0)",  # appendix C 8
    "one line too many": "print('1\\n2\\n3')",
    "a value that a shell would show": "'1\\n2'",
    "right, then an error": "print('1\\n2')\nraise ValueError",
    "right, then exit 1": "print('1\\n2')\nexit(1)",
    "kills itself": "import os\nos.kill(os.getpid(), 9)",
    "kills everything": "import os\nos.kill(-1, 9)",
    "kills its parent": "import os\nos.kill(os.getppid(), 9)",
    "never ends": "while True: pass",
    "sleeps to the limit": "import time\ntime.sleep(99)",
    "eats memory": "x = bytearray(1 << 34)",
    "floods": "while True: print('1\\n2')",
    "no program": "1 2 (",
    "on stderr": "import sys\nprint('1\\n2', file=sys.stderr)",
}


@pytest.mark.parametrize("how", RIGHT)
async def test_right_programs(box: LocalSandbox, how: str) -> None:
    result, _ = await graded(box, RIGHT[how], {"input_output": TWO_LINES})
    assert (result.accuracy, result.score, result.verifier) == (1.0, 1.0, "unit_tests")


@pytest.mark.parametrize("how", WRONG)
async def test_wrong_programs(box: LocalSandbox, how: str) -> None:
    tests = QUICK.model_copy(update={"wall_s": 1.0, "cpu_s": 1.0})
    result, _ = await graded(box, WRONG[how], {"input_output": TWO_LINES}, tests)
    assert (result.accuracy, result.score) == (0.0, 0.0), result


FUNCTIONS_RIGHT = {
    "function": "def add(a, b):\n    return a + b",
    "method": "class Solution:\n    def add(self, a, b):\n        return a + b",
    "prints on the way": "def add(a, b):\n    print('result-', 7)\n    return a + b",
}
FUNCTIONS_WRONG = {
    "wrong value": "def add(a, b):\n    return a - b",
    "prints instead": "print(3)\ndef add(a, b): print(a + b)",
    "no such function": "def plus(a, b): return a + b",
    "exits": "import os\ndef add(a, b): os._exit(0)",
    "guesses the marker": "def add(a, b):\n    print('result-' + '0' * 32 + ':' + str(a + b))",
    "equal to everything": "class E(int):\n    def __eq__(self, other): return True\ndef add(a, b): return E(9)",
    "not JSON": "def add(a, b): return {a + b}",
    "true for one": "def add(a, b): return True",
    "forges the only result": (
        "import sys\ndef add(a, b):\n    code = sys._getframe(1).f_code\n"
        "    marker = [c for c in code.co_consts if isinstance(c, str) and c.startswith('result-')][0]\n"
        "    print(marker + '0', flush=True)\n    import os\n    os._exit(0)"
    ),
}


@pytest.mark.parametrize("how", FUNCTIONS_RIGHT)
async def test_right_functions(box: LocalSandbox, how: str) -> None:
    assert (await graded(box, FUNCTIONS_RIGHT[how], {"input_output": ADD}))[0].accuracy == 1.0


@pytest.mark.parametrize("how", FUNCTIONS_WRONG)
async def test_wrong_functions(box: LocalSandbox, how: str) -> None:
    assert (await graded(box, FUNCTIONS_WRONG[how], {"input_output": ADD}))[0].accuracy == 0.0


async def test_all_or_nothing_and_the_hackable_fraction(box: LocalSandbox) -> None:
    meta = {
        "public_tests": {"input": ["1"], "output": ["1"]},
        "private_tests": {"input": ["2", "3"], "output": ["4", "9"]},
        "generated_tests": [{"input": "4", "output": "16"}],
    }
    special = "n = int(input())\nprint({1: 1, 2: 4}.get(n, 0))"
    result, counters = await graded(box, special, meta)
    assert (result.accuracy, result.score, counters["tests_run"]) == (0.0, 0.0, 2)  # ends with the first failure
    fraction = QUICK.model_copy(update={"fraction": True})
    result, counters = await graded(box, special, meta, fraction)
    assert (result.accuracy, result.score, counters["tests_run"]) == (0.0, 0.5, 4)
    assert (await graded(box, "print(int(input()) ** 2)", meta))[0].accuracy == 1.0


async def test_a_hard_coded_table_fails_hidden_tests_and_is_flagged(box: LocalSandbox) -> None:
    meta = {
        "public_tests": {"input": ["1", "2", "3"], "output": ["alpha", "beta", "gamma"]},
        "private_tests": {"input": ["4"], "output": ["delta"]},
    }
    program = "print({'1': 'alpha', '2': 'beta', '3': 'gamma'}[input()])"
    result, counters = await graded(box, program, meta)
    assert (result.accuracy, result.flags) == (0.0, ("hard_coded",))
    assert counters["flag_hard_coded"] == 1


class Spying:
    """The real sandbox, and everything that goes into it."""

    def __init__(self, box: LocalSandbox) -> None:
        self.box, self.seen = box, ""

    async def exec(self, code: str, **more: Any) -> ExecResult:
        self.seen += code + json.dumps(more.get("stdin")) + str(more.get("files"))
        return await self.box.exec(code, **more)


async def test_expected_outputs_and_other_inputs_never_enter_the_sandbox(box: LocalSandbox) -> None:
    spy = Spying(box)
    meta = {"private_tests": {"input": ["first-input", "second-input"], "output": ["SECRET-1", "SECRET-2"]}}
    await graded(spy, "print(input())", meta)
    assert "first-input" in spy.seen
    assert "SECRET" not in spy.seen and "second-input" not in spy.seen


class Broken:
    """A sandbox that fails so many times."""

    def __init__(self, box: LocalSandbox, failures: int) -> None:
        self.box, self.left = box, failures

    async def exec(self, code: str, **more: Any) -> ExecResult:
        if self.left > 0:
            self.left -= 1
            raise SandboxUnavailable("gone")
        return await self.box.exec(code, **more)


async def test_a_broken_sandbox_is_retried_and_then_unknown(box: LocalSandbox) -> None:
    tests = QUICK.model_copy(update={"retries": 2})
    result, counters = await graded(Broken(box, 2), RIGHT["prints"], {"input_output": TWO_LINES}, tests)
    assert (result.accuracy, counters["test_retries"]) == (1.0, 2)
    result, counters = await graded(Broken(box, 99), RIGHT["prints"], {"input_output": TWO_LINES}, tests)
    assert (result.accuracy, result.score, result.flags) == (None, 0.0, ("unverifiable",))
    assert (counters["test_infra_failures"], counters["unknown"]) == (1, 1)


async def test_a_problem_without_tests_stops_the_run(box: LocalSandbox) -> None:
    with pytest.raises(UserError, match="has no tests"):
        await graded(box, "print(1)", {})
    with pytest.raises(UserError, match="needs a sandbox"):
        await graded(None, "print(1)", {"input_output": TWO_LINES})


async def test_no_answer_section_is_wrong(box: LocalSandbox) -> None:
    mine = Trajectory("0.0.0", problem(input_output=TWO_LINES), "0.0", 0, 0, Transcript(), policy_text="print('1\\n2')")
    config = RewardConfig(verifier="unit_tests", tests=QUICK)
    async with Rewarder(config, build_protocol(ProtocolConfig(boxed=False)), box) as rewarder:
        assert (await rewarder.score(mine)).flags == ("no_answer",)


async def test_long_outputs_are_compared_whole(box: LocalSandbox) -> None:
    long = "\n".join(str(i) for i in range(60_000))
    meta = {"input_output": {"inputs": [""], "outputs": [long]}}
    program = "for i in range(60_000): print(i)"
    assert (await graded(box, program, meta))[0].accuracy == 1.0
    assert (await graded(box, program + "\nprint(1)", meta))[0].accuracy == 0.0
    assert (await graded(box, program.replace("print(i)", "print(i if i != 30_000 else 1)"), meta))[0].accuracy == 0.0


async def test_k_tests_at_most_hidden_ones_first(box: LocalSandbox) -> None:
    meta = {"public_tests": {"input": ["1"], "output": ["1"]}, "private_tests": {"input": ["2"], "output": ["2"]}}
    runner = TestRunner(QUICK.model_copy(update={"max_tests": 1}), box, Counter())
    outcome = await runner.run(problem(**meta), "print(2)")
    assert verdict(outcome, QUICK) == (1.0, 1.0)


async def test_layouts_and_what_is_wrong_with_them() -> None:
    assert [c.given for c in cases_of(problem(input_output=json.dumps(TWO_LINES)))] == ["1 2\n"]
    assert cases_of(problem(input_output={"inputs": [["a", "b"]], "outputs": [["1", "2"]]}))[0].expected == "1\n2"
    assert [c.function for c in cases_of(problem(input_output=ADD))] == ["add", "add"]
    for meta in (
        {"input_output": "{"},
        {"input_output": {"inputs": ["1"], "outputs": []}},
        {"input_output": {**ADD, "fn_name": "os.system('x')"}},
        {"public_tests": [{"in": 1}]},
        {"input_output": [1]},
    ):
        with pytest.raises(UserError, match="problem 'p'"):
            cases_of(problem(**meta))


async def test_comparison() -> None:
    assert same_output("1\r\n2\n", "1\n2")
    assert not same_output("1\n2", "1\n\n2")
    assert not same_output("a b", "a  b")
    assert not same_output("0.5", "0.50")
    assert same_output("x 0.5", "x 0.5000001", 1e-6)
    assert not same_output("nan", "NaN", 1.0)
    assert same_value([1, [2.0]], [1, [2]])
    assert not same_value(1, True)
    assert not same_value([1, 2], [1])
    assert not same_value({"a": 1}, {"a": 2})
    assert same_value([[1, 2]], [1, 2])  # APPS wraps results


async def test_rows_of_code_problems_keep_their_tests(tmp_path: Path) -> None:
    big = {"inputs": ["x" * 900], "outputs": ["y" * 900]}
    row = {"question": "Echo.", "input_output": json.dumps(big), "public_tests": {"input": ["1"], "output": ["1"]}}
    file = tmp_path / "code.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    loaded = load_problems(ProblemsConfig(kind="jsonl", path=str(file)))
    assert [c.given for c in cases_of(loaded[0])] == ["1", "x" * 900]
    assert loaded[0].answer == ""
