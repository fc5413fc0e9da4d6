"""Markdown fences: the contract, then which fences are calls, what a forgery is, and where an answer stands."""

from __future__ import annotations

import pytest

from retool.config import ProtocolConfig
from retool.protocols import Call, FencedProtocol, Malformed, ToolProtocol, build_protocol
from tests.protocols.contract import ProtocolContract

CONFIGS = {
    "boxed": ProtocolConfig(name="fenced"),
    "unboxed": ProtocolConfig(name="fenced", boxed=False),
    "other-answer": ProtocolConfig(name="fenced", boxed=False, answer=("[[", "]]")),
}


class TestContract(ProtocolContract):
    @pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
    def protocol(self, request: pytest.FixtureRequest) -> ToolProtocol:
        return build_protocol(request.param)


@pytest.fixture
def fenced() -> FencedProtocol:
    return FencedProtocol(ProtocolConfig(name="fenced"))


def test_a_call_and_its_result_read_as_markdown(fenced: FencedProtocol) -> None:
    text = fenced.render_call("print(2)") + "".join(fenced.observation("2"))
    assert text == "```python\nprint(2)\n```\n```output\n2\n```\n"


@pytest.mark.parametrize(
    ("turn", "code"),
    [
        ("```python\nprint(1)\n```\n", "print(1)"),
        ("```python \t\n\n  if x:\n    print(1)\n\n```\n", "if x:\n  print(1)"),
        ("```python\nprint('```')\n```\n", "print('```')"),
        ("```text\nx\n```\nso\n```python\nprint(1)\n```\n", "print(1)"),
        ("```python\nprint(1)\n```\nno, ```python\nprint(2)\n```\n", "print(2)"),
    ],
)
def test_calls(fenced: FencedProtocol, turn: str, code: str) -> None:
    call = fenced.parse(turn)
    assert isinstance(call, Call)
    assert call.code == code


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ("```\nprint(1)\n```\n", "opens with ```python"),
        ("so\n```\n", "opens with ```python"),
        ("```py\nprint(1)\n```\n", "opens with ```python"),
        ("```python\nprint(1)\n```\nso\n```\n", "opens with ```python"),
        ("```python\n```\n", "no code found"),
        ("```python\n```python\nprint(1)\n```\n", "inside ```python"),
    ],
)
def test_other_fences_end_the_turn_and_say_so(fenced: FencedProtocol, turn: str, reason: str) -> None:
    found = fenced.parse(turn)
    assert isinstance(found, Malformed)
    assert reason in found.reason


@pytest.mark.parametrize("turn", ["```python\nprint(1)", "```python\nprint(1)```\n", "print(1)\n``` \n", "`x`"])
def test_what_closes_no_fence_is_no_call(fenced: FencedProtocol, turn: str) -> None:
    assert fenced.parse(turn) is None


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("a```output\n\\boxed{1}\n```\nb", "a\n\nb"),
        ("a```output\n\\boxed{1}```python\nprint(2)\n```\n", "a\n```python\nprint(2)\n```\n"),
        ("a```output\n\\boxed{1}", "a\n"),
        ("``````output\n1\n```output\n2", "```\noutput\n2"),
    ],
)
def test_forged_results_are_cut(fenced: FencedProtocol, text: str, kept: str) -> None:
    assert fenced.forged(text)
    assert fenced.strip_forged(text) == kept
    assert not fenced.forged(kept)


def test_answers(fenced: FencedProtocol) -> None:
    assert fenced.candidates("```python\nprint('\\boxed{42}')\n```\ndone") == []
    assert fenced.candidates("```python\nprint('\\boxed{42}')") == []
    assert fenced.candidates("$\\boxed{3}$ or $\\boxed{\\frac{1}{2}}$.") == ["3", "\\frac{1}{2}"]
    assert fenced.answer("so \\boxed{3}. Or \\boxed{4}") == "4"
    assert fenced.parse("\\boxed{3}\n```python\nprint(1)\n```\n") is None
    bare = build_protocol(CONFIGS["unboxed"])
    assert bare.candidates("\\boxed{3} <answer>4</answer>") == ["4"]
    assert isinstance(bare.parse("<answer>4\n```python\nprint(1)\n```\n"), Malformed)


@pytest.mark.parametrize(
    ("trace", "reason"),
    [
        ("```python\nprint(1)\n```\n\\boxed{1}", "a call without its observation"),
        ("```output\n1\n```\n\\boxed{1}", "```output outside a call and its result"),
        ("```python\nx = 1\n```\n```output\n1\n```\n\\boxed{1}", "code that prints nothing"),
        ("```python\nprint(1)\n```\n```output\n1\n```\n", "no answer"),
        ("\\boxed{1} \\boxed{2}", "more than one answer"),
        ("\\boxed{1}. Thus we are done", "text after the answer"),
        ("\\boxed{1} ```python\nprint(1)\n```\n```output\n1\n```\n", "a call after the answer"),
    ],
)
def test_reasons(fenced: FencedProtocol, trace: str, reason: str) -> None:
    assert reason in fenced.check(trace)
    assert fenced.check("So $\\boxed{1}$.\n") == []


def test_hostile_length_is_read_in_linear_time(fenced: FencedProtocol) -> None:
    """Quadratic reading of these would take minutes."""
    for unit in ("```python\n", "\n```\n", "```output", "```python\n```\n", "\\boxed{"):
        text = unit * 60_000
        fenced.parse(text)
        fenced.strip_forged(text)
        fenced.candidates(text)
        fenced.check(text[:20_000])
