r"""The programmatic teacher: writes a demonstration from a problem's own material, with or without the tool.

Material is `Problem.meta["teacher"]`. A procedural family gives `code` (a script that prints the answer) and `steps`
(text reasoning). A data set whose solutions carry calculator marks (`48/2=<<48/2=24>>24`, as GSM8K does) gives
`solution`: its marks become one script, and what each prints must be what the solution claims. Whether a trace uses
the tool is drawn from (seed, problem id) alone, so it says nothing about the problem's family.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from retool.records import Problem

_MARK = re.compile(r"<<([^<>=]+)=([^<>]*)>>")
_CLAIM = re.compile(r"\s*=?\s*\$?<<[^<>=]+=([^<>]*)>>\1")
_SAFE = re.compile(r"[0-9.+\-*/() ]{1,80}")
_RESULT = re.compile(r"-?[0-9]*\.?[0-9]+")


class NoMaterial(Exception):
    """This teacher cannot write about that problem; the text is the reason that is counted."""


@dataclass(frozen=True)
class Plan:
    """What the teacher will write. Without the tool: `steps`, then the answer. With it: `code` is executed first,
    `accepts(output)` says whether its output is what the teacher expects, and `answer(output)` is its answer."""

    steps: tuple[str, ...]
    code: str | None
    accepts: Callable[[str], bool]
    answer: Callable[[str], str]


def uses_tool(seed: int, problem: Problem, share: float) -> bool:
    """A coin with probability `share`, keyed by seed and problem."""
    digest = blake2b(f"{seed}:{problem.id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def plan(problem: Problem, tool: bool) -> Plan:
    """Raises `NoMaterial`."""
    material: dict[str, Any] = problem.meta.get("teacher") or {}
    if "code" in material:
        return Plan(
            steps=tuple(material.get("steps", ())),
            code=str(material["code"]) if tool else None,
            accepts=lambda output: bool(output.strip()),
            answer=(lambda output: output.strip().splitlines()[-1]) if tool else (lambda _: problem.answer),
        )
    if "solution" in material:
        return _from_marks(str(material["solution"]), problem.answer, tool)
    raise NoMaterial("no teacher material")


def _from_marks(solution: str, answer: str, tool: bool) -> Plan:
    lines = [line for line in solution.splitlines() if line.strip() and not line.startswith("####")]
    steps = tuple(_MARK.sub("", line).strip() for line in lines)
    if not steps:
        raise NoMaterial("no reasoning in the solution")
    if not tool:
        return Plan(steps, None, lambda _: True, lambda _: answer)
    code: list[str] = []
    expected: list[str] = []
    for line in lines:
        marks = _MARK.findall(line)
        if marks:
            code.append(f"# {_claimless(line)}")
        for expression, result in marks:
            code.append(f"print({_arithmetic(expression)})")
            expected.append(result.strip())
    if not expected:
        raise NoMaterial("no calculation in the solution")
    return Plan(steps, "\n".join(code), lambda output: _same_numbers(output.split(), expected), lambda _: answer)


def _claimless(line: str) -> str:
    """The line without the results it claims: a comment must not know what the script is about to find."""
    return " ".join(_MARK.sub("", _CLAIM.sub("", line)).split())


def _arithmetic(expression: str) -> str:
    """The expression itself when it is plain arithmetic in Python's syntax. Nothing is evaluated here."""
    text = expression.strip()
    if not _SAFE.fullmatch(text):
        raise NoMaterial("a calculation that is not plain arithmetic")
    try:
        ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise NoMaterial("a calculation that is not plain arithmetic") from error
    return text


def _same_numbers(printed: list[str], expected: list[str]) -> bool:
    """Whether the sandbox printed what the solution claims, to the digits that it claims."""
    if len(printed) != len(expected):
        return False
    for value, claim in zip(printed, expected):
        if not _RESULT.fullmatch(claim) or not re.fullmatch(r"-?[0-9.e+-]+", value):
            return False
        digits = len(claim.partition(".")[2])
        if abs(float(value) - float(claim)) > 0.5 * 10**-digits * (1 if digits else 1e-6) + 1e-9:
            return False
    return True
