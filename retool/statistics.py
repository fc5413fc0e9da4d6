"""Figures with their uncertainty: accuracy with a 95 % interval, and how the tool was used (ReTool, section 4.3)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from retool.records import Trajectory

Z95 = 1.959963984540054


def interval(per_problem: Sequence[Sequence[float]]) -> tuple[float, tuple[float, float]]:
    """Mean accuracy and its 95 % interval; one inner sequence a problem, since samples of one problem are not
    independent. The normal interval over problem means; Wilson's where that one fails: with one 0/1 sample a problem,
    or when all means are equal."""
    means = [sum(s) / len(s) for s in per_problem if s]
    n = len(means)
    if n == 0:
        return float("nan"), (float("nan"), float("nan"))
    p = sum(means) / n
    var = sum((m - p) ** 2 for m in means) / max(n - 1, 1)
    if var == 0 or all(len(s) <= 1 for s in per_problem):
        d = 1 + Z95**2 / n
        mid, half = (p + Z95**2 / (2 * n)) / d, Z95 / d * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
        return p, (min(p, max(0.0, mid - half)), max(p, min(1.0, mid + half)))  # p itself, rounding or not
    half = Z95 * math.sqrt(var / n)
    return p, (max(0.0, p - half), min(1.0, p + half))


def summarise(trajectories: Iterable[Trajectory]) -> dict[str, Any]:
    """Accuracy over the trajectories that could be judged, and tool use over the same ones."""
    everything = list(trajectories)
    judged = [t for t in everything if t.usable]
    per_problem: dict[str, list[float]] = defaultdict(list)
    for t in judged:
        assert t.reward is not None and t.reward.accuracy is not None
        per_problem[t.problem.id].append(t.reward.accuracy)
    accuracy, ci95 = interval(list(per_problem.values()))
    out: dict[str, Any] = {
        "accuracy": accuracy,
        "ci95": list(ci95),
        "n": len(judged),
        "problems": len(per_problem),
        "dropped": len(everything) - len(judged),
    }
    out.update(tool_use(judged))
    return out


def tool_use(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """The behaviour metrics of ReTool's analysis that need no judge (spec A 1.7).

    `length`: tokens after the prompt; `model_length`: those sampled. `timing`: mean over blocks of (start of the block
    / length). Pass rates look at the last block of trajectories with at least one, split by final answer.
    """
    n = len(trajectories)
    if n == 0:
        return {}
    with_code = [t for t in trajectories if t.tool_calls]
    blocks = [c for t in trajectories for c in t.tool_calls]
    timings = [x for t in with_code for x in block_starts(t)]

    def passed(right: bool) -> float:
        last = [t.tool_calls[-1].ok for t in with_code if (t.reward is not None and t.reward.accuracy == 1.0) is right]
        return sum(last) / len(last) if last else float("nan")

    return {
        "code_ratio": len(with_code) / n,
        "calls": len(blocks) / n,
        "calls_ok": sum(c.ok for c in blocks) / len(blocks) if blocks else float("nan"),
        "correct_code": float(sum(c.ok for c in blocks)),
        "code_lines": sum(sum(bool(x.strip()) for x in c.code.splitlines()) for c in blocks) / n,
        "code_pass_if_right": passed(True),
        "code_pass_if_wrong": passed(False),
        "length": sum(len(t.transcript) - t.transcript.prompt_len for t in trajectories) / n,
        "model_length": sum(t.transcript.n_action for t in trajectories) / n,
        "timing": sum(timings) / len(timings) if timings else float("nan"),
        "truncated": sum(t.status.startswith("truncated") for t in trajectories) / n,
    }


def block_starts(trajectory: Trajectory) -> list[float]:
    """Start of each executed code block as a share of the response's length."""
    total = len(trajectory.transcript) - trajectory.transcript.prompt_len
    out, at = [], -trajectory.transcript.prompt_len
    called = {c.turn for c in trajectory.tool_calls}
    for span in trajectory.transcript.spans:
        if span.origin == "policy" and span.code is not None and span.turn in called:
            out.append((at + span.code[0]) / total)
        at += len(span)
    return out
