"""A judge's confidence as a score (2503.23829; B §5.2): pure functions over the first token's alternatives."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

from retool.config.reward import LabelsConfig

SoftMode = Literal["paper", "renormalised", "binary"]
_BLANKS = " \t\r\n\u0120\u010a\u2581"  # the last three are how tokenizers write blanks


def label_mass(alternatives: Mapping[str, float], labels: Iterable[str]) -> float:
    """Probability of all tokens that spell one of the labels, blanks aside. `alternatives`: token -> log-prob."""
    wanted = {label.strip(_BLANKS) for label in labels}
    return min(1.0, sum(math.exp(lp) for token, lp in alternatives.items() if token.strip(_BLANKS) in wanted))


def said(token: str, labels: LabelsConfig) -> bool | None:
    """What the token says: True, False, or None when it is no label."""
    bare = token.strip(_BLANKS)
    if bare in {label.strip(_BLANKS) for label in labels.right}:
        return True
    return False if bare in {label.strip(_BLANKS) for label in labels.wrong} else None


def soft_score(verdict: bool | None, yes: float, no: float, mode: SoftMode) -> float | None:
    """The score in [0, 1]; None when the judge's answer cannot be read.

    `paper`: p(yes) after yes, 1 - p(no) after no; probabilities over the whole vocabulary. `renormalised`: p(yes) over
    both, whatever was said. `binary`: what was said.
    """
    if mode == "renormalised":
        return yes / (yes + no) if yes + no > 0 else None
    if verdict is None:
        return None
    if mode == "binary":
        return float(verdict)
    return yes if verdict else 1.0 - no
