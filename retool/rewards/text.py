"""Texts without the parts that do not count. Every function is one linear pass: the text may be hostile and long."""

from __future__ import annotations

import re
from collections.abc import Sequence

from retool.protocols.base import ToolProtocol

_SPECIAL_TAIL = re.compile(r"(?:\s*(?:<\|[^|<>\s]{1,40}\|>|</s>|<eos>|<pad>|<end_of_turn>))+\s*\Z")
_MATHS = (("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)"), ("$", "$"))
_COMMAND = re.compile(r"\\[a-zA-Z]+\*?")
_TAG = re.compile(r"</?[a-zA-Z][a-zA-Z0-9_]{0,30}>|<\|[^|<>\s]{1,40}\|>")
_LONGEST_TAIL = 400  # characters in which special tokens at the end are looked for
_FENCE = re.compile(r"```[ \t]*([a-zA-Z0-9_+-]{0,20})[ \t]*\n")


def without(text: str, opening: str, closing: str, to_end: bool = False) -> str:
    """`text` with every `opening ... closing` replaced by a blank; `to_end`: an unclosed one ends with the text."""
    kept: list[str] = []
    at = 0
    while (start := text.find(opening, at)) >= 0:
        end = text.find(closing, start + len(opening))
        if end < 0:
            if to_end:
                kept.append(text[at:start])
                return " ".join(kept)
            break
        kept.append(text[at:start])
        at = end + len(closing)
    kept.append(text[at:])
    return " ".join(kept)


def without_special_tail(text: str) -> str:
    """Without end-of-turn tokens that the policy's last token decodes to."""
    head, tail = text[:-_LONGEST_TAIL], text[-_LONGEST_TAIL:]
    return head + _SPECIAL_TAIL.sub("", tail)


def prose(text: str, protocol: ToolProtocol) -> str:
    """The words of a response: no calls, no code, no LaTeX, no tags."""
    for stop in protocol.stop:
        text = without(text, protocol.call_open, stop, to_end=True)
    text = without(text, "```", "```", to_end=True)
    for tag in protocol.control:
        text = text.replace(tag, " ")
    for opening, closing in _MATHS:
        text = without(text, opening, closing)
    return _TAG.sub(" ", _COMMAND.sub(" ", without(text, "`", "`")))


def last_program(section: str) -> str:
    """The last fenced block of an answer section, or all of it when it has no fence."""
    program = section
    at = 0
    while (opening := _FENCE.search(section, at)) is not None:
        end = section.find("```", opening.end())
        program = section[opening.end() : end if end >= 0 else len(section)]
        if end < 0:
            break
        at = end + 3
    return program.strip("\n")


def repetition(words: Sequence[str], n: int = 4) -> float:
    """Share of n-grams that occurred before; 0 for short texts."""
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
