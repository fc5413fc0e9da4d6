r"""Is an answer mathematically the reference? math-verify (LaTeX only) over sympy. Runs in the verifier worker alone.

Settings after math-verify's advice for rewards: only the given answer is read (no search for other expressions), a
malformed operator is not repaired, and `verify(gold, answer)` stays asymmetric on purpose: an answer may name its
variable (`x = 3` for 3) but must not win by restating a relation. Signal-based timeouts are off: the pool kills.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

from retool.rewards.normal import expand

logging.getLogger("math_verify").setLevel(logging.ERROR)

_TARGET = [
    LatexExtractionConfig(
        try_extract_without_anchor=False,
        boxed_match_priority=0,
        normalization_config=NormalizationConfig(
            basic_latex=True, units=True, malformed_operators=False, nits=False, boxed="all", equations=False
        ),
    )
]


def _parse(answer: str) -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(
            parse(
                f"\\boxed{{{expand(answer)}}}",
                _TARGET,
                fallback_mode="no_fallback",
                extraction_mode="first_match",
                parsing_timeout=None,
                raise_on_error=True,
            )
        )


def grade(gold: str, answer: str) -> bool | None:
    """True or False; None when the reference itself cannot be read or sympy ran out of its depth or memory."""
    try:
        expected = _parse(gold)
    except Exception:  # a parser may raise anything; whatever it was, the reference is unreadable
        return None
    if not expected:
        return None
    try:
        given = _parse(answer)
    except (RecursionError, MemoryError):
        return None
    except Exception:  # an answer that no parser accepts is not the reference
        return False
    if not given:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return bool(verify(expected, given, timeout_seconds=None, raise_on_error=True))
    except (RecursionError, MemoryError):
        return None
    except Exception:  # not comparable (a set with a relation, infinities, ...)
        return False
