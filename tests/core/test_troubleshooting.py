"""docs/troubleshooting.md quotes messages: each must still be one that the source can say."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
PAGE = REPO / "docs/troubleshooting.md"
FOREIGN = ("compose: ", "torch: ")
"""Headings with messages of other programs."""


def quoted() -> list[str]:
    """The messages in headings, `…` for what differs."""
    found = re.findall(r"^### (.+)$", PAGE.read_text(encoding="utf-8"), re.M)
    return [line.strip("`") for line in found if not line.startswith(FOREIGN)]


@cache
def said() -> tuple[str, ...]:
    """Every text of the source, `…` in the places of formatted values."""
    texts: list[str] = []
    for top in ("retool", "sandbox", "data_gen"):
        for file in (REPO / top).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    texts.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return tuple(texts)


def is_said(message: str) -> bool:
    """Whether one text of the source holds all parts of a message, in order."""
    pattern = re.compile(".*".join(re.escape(part) for part in message.split("…")), re.S)
    return any(pattern.search(text) for text in said())


def test_the_page_has_messages() -> None:
    assert len(quoted()) > 40 and len(set(quoted())) == len(quoted())


@pytest.mark.parametrize("message", quoted())
def test_the_source_says_it(message: str) -> None:
    assert len(message.replace("…", "").strip()) >= 8, "too short to be found by"
    assert is_said(message), f"no text of the source holds {message!r}"


def test_a_message_that_nobody_says_is_noticed() -> None:
    assert not is_said("no isolation tier … on this planet")


@pytest.mark.parametrize("section", ["Cause", "Fix"])
def test_every_message_has_a_cause_and_a_fix(section: str) -> None:
    parts = re.split(r"^### ", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]
    assert not [p.splitlines()[0] for p in parts if section.lower() not in p.split("\n## ")[0].lower()]
