"""Quick verdicts: what they decide, and that the computer algebra system agrees with every one of them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retool.rewards.mathematics import grade
from retool.rewards.normal import normal, quick_verdict


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        (" $18$. ", "18"),
        ("1,000", "1000"),
        ("1{,}000{,}000", "1000000"),
        ("12,34", "12,34"),
        ("+007", "7"),
        ("-0", "0"),
        ("−5", "-5"),
        ("\\text{east}", "east"),
        ("\\dfrac{1}{2}", "\\frac{1}{2}"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "( 3, \\frac{\\pi}{2} )"),
        ("\\leftarrow", "\\leftarrow"),
        ("a  b", "a b"),
        ("0.5", "0.5"),
        ("\\frac12", "\\frac{1}{2}"),
        ("\\frac{3}4 + \\sqrt2", "\\frac{3}{4} + \\sqrt{2}"),
        ("\\(5\\)", "5"),
    ],
)
def test_normal_forms(answer: str, form: str) -> None:
    assert normal(answer) == form


@given(st.text(alphabet="01,.$\\{}frac sqrt-+xé", max_size=30))
def test_equal_strings_are_equal_answers(text: str) -> None:
    assert quick_verdict(text, text) is bool(normal(text))
    assert quick_verdict(text, f" {text}") is bool(normal(text))


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        ("18", "18", True),
        ("18", "$18", True),
        ("1000", "1,000", True),
        ("18", "19", False),
        ("18", "", False),
        ("18", "1" * 5000, False),
        ("18", "18.0", None),
        ("1/2", "0.5", None),
        ("east", "\\text{east}", True),
        ("1,2", "1, 2", None),
        ("18", "{" * 13 + "18" + "}" * 13, False),
        ("(" * 20 + "x" + ")" * 20, "(" * 20 + "y" + ")" * 20, None),
    ],
)
def test_quick_verdicts(gold: str, answer: str, verdict: bool | None) -> None:
    assert quick_verdict(gold, answer) is verdict


integers = st.integers(-(10**12), 10**12)


@settings(max_examples=60, deadline=None)
@given(left=integers, right=integers, comma=st.booleans(), zeros=st.integers(0, 2), dot=st.booleans())
def test_the_verifier_agrees_about_integers(left: int, right: int, comma: bool, zeros: int, dot: bool) -> None:
    """Also for an equal pair written differently."""
    for gold, value in ((left, right), (left, left)):
        answer = f"{value:,}" if comma else f"{'-' if value < 0 else ''}{'0' * zeros}{abs(value)}"
        quick = quick_verdict(str(gold), answer)
        assert quick is (gold == value)
        assert grade(str(gold), answer) is quick
        if dot:
            assert quick_verdict(str(gold), f"${answer}$.") is quick


expressions = st.sampled_from(
    ["\\frac{1}{2}", "x+1", "\\sqrt{2}", "(1,2)", "[0,1]", "\\{1,2\\}", "2\\pi", "x^2-1", "\\dfrac{3}{4}", "0.25"]
)


@settings(max_examples=30, deadline=None)
@given(gold=expressions, space=st.sampled_from(["", " ", "\\!", "\\,"]))
def test_the_verifier_agrees_about_equal_strings(gold: str, space: str) -> None:
    answer = f" ${gold}{space}$ "
    if quick_verdict(gold, answer) is True:
        assert grade(gold, answer) is True


def test_long_and_nested_input_is_cheap() -> None:
    for hostile in ("{" * 10**6, "\\text{" * 10**5, "1," * 10**5, "\\left" * 10**5, " " * 10**6, "0" * 10**6):
        assert quick_verdict("18", hostile) is False
        assert isinstance(normal(hostile), str)
