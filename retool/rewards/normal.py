r"""Answers as strings: normal forms that change nothing about the meaning, and the verdicts that follow from them.

Equal normal forms are the same answer, and two different plain integers are different answers: neither needs a
computer algebra system. Everything else is for the worker. No evaluation happens here, and every step is linear: the
answer may be hostile and long.
"""

from __future__ import annotations

import re

LONGEST = 1000  # characters of an answer worth looking at, unless the reference itself is long
DEEPEST = 12  # nested brackets worth parsing (parsers take exponential time), unless the reference has more

_WRAPPED = re.compile(r"\\(?:text|mathrm|textbf|mathbf|textit|mbox)\s*\{([^{}\\]*)\}")
_GROUPED = re.compile(r"[+-]?[0-9]{1,3}(?:(?:,|\{,\}|\\,)[0-9]{3})+")
_INTEGER = re.compile(r"([+-]?)0*([0-9]+)")
_NOISE = re.compile(r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\[!;: ]|~")
_FRACTION = re.compile(r"\\[dt]frac(?![a-zA-Z])")
_SHORT_FRACTION = re.compile(r"\\frac\s*([0-9]|\{[^{}]*\})\s*([0-9]|\{[^{}]*\})")
_SHORT_ROOT = re.compile(r"\\sqrt\s*([0-9])")
_BRACKET = re.compile(r"[()\[\]{}]")


def expand(answer: str) -> str:
    r"""TeX's short forms written out: `\frac12` and `\sqrt2` are correct LaTeX that parsers do not read."""
    text = _FRACTION.sub(r"\\frac", answer)
    return _SHORT_ROOT.sub(r"\\sqrt{\1}", _SHORT_FRACTION.sub(_braced, text))


def _braced(match: re.Match[str]) -> str:
    top, bottom = (part if part.startswith("{") else f"{{{part}}}" for part in match.groups())
    return f"\\frac{top}{bottom}"


def depth(text: str) -> int:
    """How deep brackets of any kind are nested."""
    deepest = level = 0
    for bracket in _BRACKET.findall(text):
        level += 1 if bracket in "([{" else -1
        deepest = max(deepest, level)
    return deepest


def normal(answer: str) -> str:
    """The answer without its typography: outer dollars, a final full stop, spacing commands, thousands separators."""
    text = answer.strip().removesuffix(".").strip().strip("$").removesuffix(".").strip()
    text = text.removeprefix("\\(").removesuffix("\\)").strip()
    if wrapped := _WRAPPED.fullmatch(text):
        text = wrapped.group(1).strip()
    if _GROUPED.fullmatch(text):
        text = text.replace("{,}", "").replace("\\,", "").replace(",", "")
    text = text.replace("−", "-")
    text = expand(_NOISE.sub(" ", text))
    if integer := _INTEGER.fullmatch(text):
        sign = "-" if integer.group(1) == "-" and integer.group(2) != "0" else ""
        return sign + integer.group(2)
    return " ".join(text.split())


def quick_verdict(gold: str, answer: str) -> bool | None:
    """True, False, or None when it takes a verifier to know."""
    if len(answer) > max(LONGEST, 4 * len(gold)):
        return False
    left, right = normal(gold), normal(answer)
    if left and left == right:
        return True
    if not right or depth(answer) > max(DEEPEST, depth(gold)):
        return False
    if _INTEGER.fullmatch(left) and _INTEGER.fullmatch(right):
        return False
    return None
