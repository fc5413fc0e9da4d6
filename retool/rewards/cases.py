"""A problem's tests, in the layouts of APPS and CodeContests, and what counts as the expected output.

`Problem.meta` holds `input_output` (APPS: `{inputs, outputs, fn_name?}`, often as JSON text), or any of
`private_tests`, `generated_tests`, `public_tests` (CodeContests: `{input: [...], output: [...]}`, or rows with `input`
and `output`). Expected outputs stay in this process: nothing here is ever sent to the sandbox but the inputs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from retool.errors import UserError
from retool.records import Problem

LISTS = ("private_tests", "generated_tests", "public_tests")  # hidden ones first
COLUMNS = ("input_output", *LISTS)


@dataclass(frozen=True)
class Case:
    """`given`: standard input, or the arguments as JSON when `function` is named. `public`: the policy may know it."""

    given: str
    expected: Any
    function: str | None = None
    public: bool = False


def cases_of(problem: Problem) -> list[Case]:
    """All tests, hidden ones first, each input once. Raises `UserError` when there are none or they are malformed."""
    where = f"problem {problem.id!r}"
    found: list[Case] = []
    for name in LISTS:
        found += _pairs(_decoded(problem.meta.get(name), where, name), where, name, public=name == "public_tests")
    whole = _decoded(problem.meta.get("input_output"), where, "input_output")
    if whole:
        if not isinstance(whole, Mapping):
            raise UserError(f"{where}: input_output is a {type(whole).__name__}, not an object with inputs and outputs")
        function = whole.get("fn_name") or None
        inputs, outputs = whole.get("inputs"), whole.get("outputs")
        found += _zipped(inputs, outputs, where, "input_output", function=function, public=False)
    unique = {(c.function, c.given): c for c in reversed(found)}
    cases = [c for c in found if unique.get((c.function, c.given)) is c]
    if not cases:
        raise UserError(
            f"{where} has no tests; reward.verifier=unit_tests needs one of the columns {', '.join(COLUMNS)}"
        )
    return cases


def _decoded(value: Any, where: str, name: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where}: {name} is not JSON ({error})") from error


def _pairs(value: Any, where: str, name: str, public: bool) -> list[Case]:
    if not value:
        return []
    if isinstance(value, Mapping):
        keys = ("input", "output") if "input" in value else ("inputs", "outputs")
        return _zipped(value.get(keys[0]), value.get(keys[1]), where, name, function=None, public=public)
    try:
        inputs, outputs = [row["input"] for row in value], [row["output"] for row in value]
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"{where}: {name} must hold rows with input and output") from error
    return _zipped(inputs, outputs, where, name, function=None, public=public)


def _zipped(inputs: Any, outputs: Any, where: str, name: str, function: str | None, public: bool) -> list[Case]:
    lists = isinstance(inputs, Sequence) and isinstance(outputs, Sequence) and not isinstance(inputs, str)
    if not lists or len(inputs) != len(outputs):
        raise UserError(f"{where}: {name} needs as many outputs as inputs")
    if function is not None:
        if not str(function).isidentifier():
            raise UserError(f"{where}: fn_name {function!r} is no name of a function")
        return [Case(json.dumps(args), out, str(function), public) for args, out in zip(inputs, outputs)]
    return [Case(_text(given), _text(out), None, public) for given, out in zip(inputs, outputs)]


def _text(value: Any) -> str:
    """Lines may come as a list."""
    if isinstance(value, list):
        return "\n".join(_text(v) for v in value)
    return str(value)


def same_output(expected: str, given: str, tolerance: float = 0.0) -> bool:
    """Whether two outputs agree in every line and in their number; blanks at line ends and empty last lines aside."""
    left, right = _lines(expected), _lines(given)
    if len(left) != len(right):
        return False
    return all(a == b or (tolerance > 0 and _same_line(a, b, tolerance)) for a, b in zip(left, right))


def _lines(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _same_line(left: str, right: str, tolerance: float) -> bool:
    words = left.split(), right.split()
    return len(words[0]) == len(words[1]) and all(a == b or _near(a, b, tolerance) for a, b in zip(*words))


def _near(left: str, right: str, tolerance: float) -> bool:
    try:
        a, b = float(left), float(right)
    except ValueError:
        return False
    return math.isfinite(a) and math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)


def same_value(expected: Any, given: Any, tolerance: float = 0.0) -> bool:
    """Whether two JSON values are equal; true is not 1. APPS wraps some results in a list of one."""
    if _same(expected, given, tolerance):
        return True
    return isinstance(expected, list) and len(expected) == 1 and _same(expected[0], given, tolerance)


def _same(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, bool) or isinstance(b, bool) or a is None or b is None:
        return a is b
    if isinstance(a, int | float) and isinstance(b, int | float):
        return a == b or (tolerance > 0 and math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance))
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y, tolerance) for x, y in zip(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k], tolerance) for k in a)
    return type(a) is type(b) and bool(a == b)
