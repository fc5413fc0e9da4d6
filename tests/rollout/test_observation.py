"""What the model is shown of an execution."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retool.rollout.observation import malformed, middle_cut, render
from sandbox.types import ExceptionInfo, ExecResult, Limits, Status

LIMITS = Limits(wall_s=2.5, cpu_s=4, memory_mb=64, output_kill_bytes=1000)


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (ExecResult(Status.OK, "1\n2\n"), "1\n2"),
        (ExecResult(Status.OK, " \n"), "(no output)"),
        (ExecResult(Status.ERROR, "a\n", exception=ExceptionInfo("KeyError", "'x'", "Trace")), "a\nKeyError: 'x'"),
        (ExecResult(Status.ERROR, exception=ExceptionInfo("AssertionError", "", "Trace")), "AssertionError"),
        (ExecResult(Status.ERROR, stderr="line\nlast line\n"), "last line"),
        (ExecResult(Status.EXIT, "x", exit_code=3), "x\nerror: exit code 3"),
        (ExecResult(Status.SIGNAL, signal=9), "error: killed by signal 9"),
        (ExecResult(Status.TIMEOUT, "so far\n"), "so far\nerror: timed out after 2.5 s"),
        (ExecResult(Status.CPU_LIMIT), "error: used more than 4 s of CPU time"),
        (ExecResult(Status.MEMORY_LIMIT), "error: used more than 64 MiB of memory"),
        (ExecResult(Status.OUTPUT_LIMIT), "error: printed more than 1000 bytes"),
        (ExecResult(Status.REJECTED, stderr="too large"), "error: rejected: too large"),
        (ExecResult(Status.CANCELLED), "error: cancelled"),
    ],
)
def test_texts(result: ExecResult, text: str) -> None:
    assert render(result, 400, LIMITS) == text


def test_every_outcome_has_a_text() -> None:
    for status in Status:
        assert render(ExecResult(status), 400, LIMITS).strip()


def test_the_middle_is_cut() -> None:
    assert middle_cut("a" * 300 + "b" * 300, 400) == "a" * 199 + "..." + "b" * 198
    assert middle_cut("abc", 3) == "abc"


@given(st.text(), st.text(), st.integers(16, 60), st.sampled_from(list(Status)))
def test_never_longer_than_allowed_and_the_error_survives(out: str, message: str, chars: int, status: Status) -> None:
    result = ExecResult(status, out, exception=ExceptionInfo("E", message, "") if status is Status.ERROR else None)
    text = render(result, chars, LIMITS)
    assert 0 < len(text) <= chars
    if status is Status.ERROR and len(message.strip()) < 10:
        assert text.endswith(f"E: {message.strip()}" if message.strip() else "E")
    assert len(malformed(message, chars)) <= chars
