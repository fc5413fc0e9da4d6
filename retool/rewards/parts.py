"""The parts of a score beside the answer: pure functions of what a trajectory is, each bounded.

A part is `(Facts, config) -> float | None`; None means that it is not switched on. `score` adds them up and clips.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from retool.config.reward import FormatConfig, RewardConfig, ToolBonusConfig, TurnsConfig
from retool.records import ToolCall

_SCRIPTS = {
    "en": r"A-Za-z\u00c0-\u024f",
    "zh": r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f",
    "ja": r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff",
    "ko": r"\u1100-\u11ff\uac00-\ud7af",
    "ru": r"\u0400-\u04ff",
    "ar": r"\u0600-\u06ff\u0750-\u077f",
    "he": r"\u0590-\u05ff",
    "el": r"\u0370-\u03ff\u1f00-\u1fff",
    "hi": r"\u0900-\u097f",
    "th": r"\u0e00-\u0e7f",
}
_UNSPACED = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W\d_{_UNSPACED}]+(?:['’][^\W\d_{_UNSPACED}]+)*")


@dataclass(frozen=True)
class Facts:
    """What the parts may look at. `accuracy`: 1 or 0. `quality`: the verifier's soft score in [0, 1], equal to
    `accuracy` when it has none. `text`: what the policy wrote. `prose`: its words without code and mathematics.
    `action_tokens`, `all_tokens`: length of the response without and with tool output."""

    accuracy: float
    quality: float
    text: str = ""
    prose: str = ""
    n_calls: int = 0
    action_tokens: int = 0
    all_tokens: int = 0
    flags: list[str] = field(default_factory=list)


def language_share(prose: str, language: str) -> float | None:
    """Words in the script of `language` / words (A §4.1); None without words. Han and kana count one by one."""
    words = _WORD.findall(prose)
    if not words:
        return None
    inside = re.compile(f"[{_SCRIPTS[language]}]")
    return sum(inside.match(w) is not None for w in words) / len(words)


def format_share(text: str, config: FormatConfig) -> float:
    """How well formed a response is, in [0, 1] (A §4.1). A tag that stands there twice counts as missing."""
    flat = [tag for pair in config.tags for tag in pair]
    once = [text.count(tag) == 1 for tag in flat]
    if config.kind == "graded":
        return sum(once) / len(flat)
    if not all(once):
        return 0.0
    body = text.strip()
    at = 0
    for opening, closing in config.tags:
        start = body.find(opening, at)
        end = body.find(closing, start + len(opening)) if start >= 0 else -1
        if end < 0 or (body[at:start].strip() and not config.leading_text):
            return 0.0
        at = end + len(closing)
    return 0.0 if body[at:].strip() else 1.0


def tool_bonus(calls: int, config: ToolBonusConfig) -> float:
    """What a wrong answer earns for its calls in verl's recipe, and in slime's version of it (A §1.8.1)."""
    counted = calls if config.count == "verl" else (calls - 2) / 2
    return min(config.cap, config.per_call * counted)


def turn_penalties(calls: Sequence[ToolCall], turns: int, config: TurnsConfig) -> list[float]:
    """[turns] what each turn loses; together at most `cap`: the first ones pay."""
    out = [0.0] * turns
    left = config.cap
    for call in calls:
        if call.turn < turns and not call.ok:
            fee = min(left, config.malformed if call.status == "malformed" else config.failed_call)
            out[call.turn] -= fee
            left -= fee
    return out


# -- the parts, by the name they have in `RewardResult.parts` ---------------------------------------------------------


def _answer(facts: Facts, config: RewardConfig) -> float:
    return config.wrong + (config.correct - config.wrong) * facts.quality


def _calls(facts: Facts, config: RewardConfig) -> float | None:
    return -min(config.call_cost * facts.n_calls, config.max_call_cost) if facts.accuracy >= 1 else None


def _format(facts: Facts, config: RewardConfig) -> float | None:
    return None if config.format is None else config.format.weight * format_share(facts.text, config.format)


def _language(facts: Facts, config: RewardConfig) -> float | None:
    if config.language is None:
        return None
    share = language_share(facts.prose, config.language.language)
    if share is None:
        facts.flags.append("no_words")
    return config.language.weight * (share or 0.0)


def _overlong(facts: Facts, config: RewardConfig) -> float | None:
    if config.overlong is None:
        return None
    length = facts.action_tokens if config.overlong.count == "action" else facts.all_tokens
    return config.overlong.penalty(length)


def _tool_bonus(facts: Facts, config: RewardConfig) -> float | None:
    if config.tool_bonus is None or facts.accuracy >= 1:
        return None
    return tool_bonus(facts.n_calls, config.tool_bonus)


PARTS: dict[str, Callable[[Facts, RewardConfig], float | None]] = {
    "answer": _answer,
    "calls": _calls,
    "format": _format,
    "language": _language,
    "overlong": _overlong,
    "tool_bonus": _tool_bonus,
}


def parts_of(facts: Facts, config: RewardConfig) -> dict[str, float]:
    """Every part that is switched on."""
    found = {name: part(facts, config) for name, part in PARTS.items()}
    return {name: value for name, value in found.items() if value is not None}


def clipped(score: float, config: RewardConfig) -> float:
    """The score within `reward.clip`."""
    return score if config.clip is None else min(max(score, config.clip[0]), config.clip[1])


def score_of(accuracy: float | None, calls: int, config: RewardConfig) -> tuple[float, dict[str, float]]:
    """(score, its parts) of an accuracy and a number of tool calls alone; 0 when the accuracy is unknown."""
    if accuracy is None:
        return 0.0, {}
    parts = parts_of(Facts(accuracy, accuracy, n_calls=calls), config)
    return clipped(sum(parts.values()), config), parts
