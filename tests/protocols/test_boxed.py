"""Balanced boxes, in one pass, whatever the text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retool.protocols.boxed import boxed


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("\\boxed{\\frac{1}{2}}", ["\\frac{1}{2}"]),
        ("first \\boxed{1} then \\boxed{ 2 }", ["1", "2"]),
        ("\\boxed{1", []),
        ("\\boxed{{1}", []),
        ("\\boxed{1}}", ["1"]),
        ("{ \\boxed{1}", ["1"]),
        ("\\boxed{\\boxed{5}}", ["\\boxed{5}"]),
        ("\\boxed{\\{1, 2\\}}", ["\\{1, 2\\}"]),
        ("\\boxed {7}", ["7"]),
        ("\\boxed{}", [""]),
        ("boxed{1}", []),
        ("\\\\boxed{1}", []),
        ("", []),
    ],
)
def test_cases(text: str, boxes: list[str]) -> None:
    assert boxed(text) == boxes


@given(st.text(alphabet="ab{}\\ 1"))
def test_balanced_content_comes_back(content: str) -> None:
    found = boxed(f"x \\boxed{{{content}}} y")
    if len(found) == 1 and found[0] == content.strip():
        return
    depth = 0
    for c in content.replace("\\{", "").replace("\\}", ""):
        depth += (c == "{") - (c == "}")
        if depth < 0:
            break
    assert depth != 0 or "\\" in content  # only unbalanced or escaping content may come back otherwise


def test_a_megabyte_of_openings_is_one_pass() -> None:
    assert boxed("\\boxed{" * 150_000) == []
    deep = boxed("\\boxed{" * 50_000 + "1" + "}" * 50_000)
    assert len(deep) == 1
