"""Whole traces: the fixture of the specification, and every reason to reject one."""

from __future__ import annotations

import pytest

from retool.config import ProtocolConfig
from retool.protocols import build_protocol

VALID = (
    "a<code>\n```python\nprint(1)\n```\n</code>\n<interpreter>\n1\n</interpreter>\n\nb<answer>\n\\boxed{1}\n</answer>"
)
CALL = "<code>\n```python\nprint(1)\n```\n</code>"
SEEN = "\n<interpreter>\n1\n</interpreter>\n\n"
ANSWER = "<answer>\n\\boxed{1}\n</answer>"


def test_the_fixture_of_the_specification_is_valid() -> None:
    protocol = build_protocol(ProtocolConfig())
    assert protocol.check(VALID) == []
    assert protocol.check(f"{VALID}\n") == []
    assert "a" + CALL + SEEN + "b" + ANSWER == VALID


@pytest.mark.parametrize(
    ("trace", "reason"),
    [
        (CALL + ANSWER, "a call without its observation"),
        (CALL + CALL + SEEN + ANSWER, "a call without its observation"),
        (CALL + SEEN, "no answer section"),
        (CALL, "a call without its observation"),
        (SEEN + ANSWER, "an observation without a call before it"),
        (CALL + SEEN + SEEN + ANSWER, "an observation without a call before it"),
        (CALL + "well" + SEEN + ANSWER, "text between a call and its observation"),
        ("<code>" + CALL + SEEN + ANSWER, "<code> inside <code>"),
        ("</code>" + ANSWER, "</code> without its opening tag"),
        ("<code>print(1)</interpreter>" + ANSWER, "</interpreter> without its opening tag"),
        ("<code>\n```python\n\n```\n</code>" + SEEN + ANSWER, "empty code"),
        ("<code>\n```python\nx = 1\n```\n</code>" + SEEN + ANSWER, "code that prints nothing"),
        ("<code>print(1)</code>" + SEEN + ANSWER, "code without a python fence"),
        ("<code>\n```python\nprint(1)\n</code>" + SEEN + ANSWER, "code without a python fence"),
        (ANSWER + ANSWER, "more than one answer section"),
        (ANSWER + "bye", "text after the answer section"),
        (ANSWER + CALL + SEEN, "<code> after the answer section"),
        ("<answer>\n1\n</answer>", "answer without a box"),
        ("<answer>\n\\boxed{1}", "<answer> is never closed"),
        ("<answer>\\boxed{1} \\boxed{2}</answer>", "several different boxes in the answer"),
        ("<answer> </answer>", "empty answer section"),
    ],
)
def test_reasons(trace: str, reason: str) -> None:
    assert reason in build_protocol(ProtocolConfig()).check(trace)


def test_without_fences_a_fence_is_not_needed() -> None:
    raw = build_protocol(ProtocolConfig(fence=False))
    assert raw.check("<code>print(1)</code><interpreter>1</interpreter><answer>\\boxed{1}</answer>") == []
