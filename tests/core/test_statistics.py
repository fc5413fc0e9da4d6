"""Accuracy intervals and tool-use metrics, with the spec's vector TV-COG."""

from __future__ import annotations

import math

import pytest

from retool.records import Problem, RewardResult, ToolCall, Trajectory
from retool.statistics import interval, summarise, tool_use
from retool.transcript import Span, Transcript


def trajectory(name: str, length: int, accuracy: float | None, blocks: list[tuple[int, str, int]]) -> Trajectory:
    """A response of `length` sampled tokens with code blocks (start, status, lines)."""
    t = Transcript([Span("prompt", (0, 0))])
    calls, at = [], 0
    for turn, (start, status, lines) in enumerate(blocks):
        n = start + 1 - at
        t.append(Span("policy", (1,) * n, turn, logprobs=(-1.0,) * n, versions=((0, 0),), code=(n - 1, n)))
        calls.append(ToolCall(turn, "x\n\n" * lines, status, ""))
        at = start + 1
    n, turn = length - at, len(blocks)
    t.append(Span("policy", (1,) * n, turn, logprobs=(-1.0,) * n, versions=((0, 0),)))
    reward = RewardResult(accuracy, accuracy or 0.0)
    return Trajectory(name, Problem(name, "q", "a"), name, 0, 0, t, tool_calls=calls, reward=reward)


def test_tv_cog() -> None:
    rows = [
        trajectory("a", 100, 1.0, [(20, "ok", 3), (60, "ok", 5)]),
        trajectory("b", 200, 0.0, [(150, "error", 4)]),
        trajectory("c", 50, 0.0, []),
    ]
    got = tool_use(rows)
    assert got["length"] == pytest.approx(116.667, abs=1e-3)
    assert got["code_ratio"] == pytest.approx(2 / 3)
    assert got["code_lines"] == pytest.approx(4.0)
    assert got["correct_code"] == 2
    assert (got["code_pass_if_right"], got["code_pass_if_wrong"]) == (1.0, 0.0)
    assert got["timing"] == pytest.approx(0.516667, abs=1e-6)


def test_unknown_and_aborted_trajectories_are_counted_and_left_out() -> None:
    rows = [trajectory("a", 5, 1.0, []), trajectory("b", 5, None, []), trajectory("c", 5, 0.0, [])]
    rows[2].status = "aborted"
    got = summarise(rows)
    assert (got["accuracy"], got["n"], got["dropped"]) == (1.0, 1, 2)


def test_intervals() -> None:
    p, (low, high) = interval([[1.0]] * 8 + [[0.0]] * 2)  # Wilson: centre and half width worked out by hand
    assert p == 0.8
    assert (low, high) == (pytest.approx(0.490162, abs=1e-5), pytest.approx(0.943318, abs=1e-5))
    for n in range(1, 60):  # the ends hold the estimate itself, whatever the rounding
        for value in (0.0, 1.0):
            p, (low, high) = interval([[value]] * n)
            assert 0 <= low <= p <= high <= 1
    p, (low, high) = interval([[1.0, 0.0], [1.0, 1.0]])
    half = 1.959964 * math.sqrt(0.125 / 2)
    assert (p, low, high) == (0.75, pytest.approx(0.75 - half, abs=1e-5), 1.0)
    assert interval([[0.0, 0.0]] * 10)[1] == interval([[0.0]] * 10)[1]  # equal means are no certainty
    assert all(math.isnan(v) for v in (interval([])[0], *interval([])[1]))
