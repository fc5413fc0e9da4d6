r"""Is a whole trace fit for imitation? A deterministic check of the tag grammar.

    trace  := text ( CODE spaces OBSERVATION text )* ANSWER spaces
    CODE   := open code close                       with `fence`, the code stands in a python fence
    OBSERVATION := open output close
    ANSWER := open text close                       with `boxed`, it holds one \boxed{...}

Source of the shape: arXiv 2504.11536, section 2.2.1 (format verification), which names the stage but not the grammar.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from retool.protocols.boxed import boxed

if TYPE_CHECKING:
    from retool.protocols.tags import TagProtocol

_FENCED = re.compile(r"\s*```python[ \t]*\n(?P<code>.*?)\n?```\s*", re.DOTALL)
_PRINT = re.compile(r"\bprint\s*\(")


@dataclass
class _Walk:
    """State of the walk over a trace: `inside` is the tag that is open, `pending` a call without its observation."""

    reasons: list[str] = field(default_factory=list)
    inside: str | None = None
    start: int = 0
    previous_end: int = 0
    pending: bool = False
    answers: int = 0

    def fail(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)


def check(trace: str, protocol: TagProtocol) -> list[str]:
    """Every reason why `trace` breaks the grammar, in order of appearance; empty when it is well formed."""
    closing = {
        protocol.code_open: protocol.code_close,
        protocol.observation_open: protocol.observation_close,
        protocol.answer_open: protocol.answer_close,
    }
    pattern = re.compile("|".join(re.escape(t) for t in protocol.control))
    walk = _Walk()
    for mark in pattern.finditer(trace):
        tag = mark.group()
        if tag in closing:
            _open(walk, tag, trace[walk.previous_end : mark.start()], protocol)
            walk.inside, walk.start = tag, mark.end()
        elif walk.inside is None or closing[walk.inside] != tag:
            walk.fail(f"{tag} without its opening tag")
            walk.inside = None
        else:
            _close(walk, trace[walk.start : mark.start()], protocol)
            walk.inside = None
        walk.previous_end = mark.end()
    if walk.inside is not None:
        walk.fail(f"{walk.inside} is never closed")
    if walk.pending:
        walk.fail("a call without its observation")
    if walk.answers == 0:
        walk.fail("no answer section")
    elif trace[walk.previous_end :].strip():
        walk.fail("text after the answer section")
    return walk.reasons


def _open(walk: _Walk, tag: str, between: str, protocol: TagProtocol) -> None:
    if walk.inside is not None:
        walk.fail(f"{tag} inside {walk.inside}")
    if walk.answers and tag != protocol.answer_open:
        walk.fail(f"{tag} after the answer section")
    if tag == protocol.observation_open:
        if not walk.pending:
            walk.fail("an observation without a call before it")
        elif between.strip():
            walk.fail("text between a call and its observation")
    elif walk.pending and walk.inside is None:
        walk.fail("a call without its observation")
        walk.pending = False


def _close(walk: _Walk, content: str, protocol: TagProtocol) -> None:
    if walk.inside == protocol.code_open:
        walk.pending = True
        fenced = _FENCED.fullmatch(content)
        if protocol.fence and not fenced:
            walk.fail("code without a python fence")
        code = fenced.group("code") if fenced else content
        if not code.strip():
            walk.fail("empty code")
        elif not _PRINT.search(code):
            walk.fail("code that prints nothing")
    elif walk.inside == protocol.observation_open:
        walk.pending = False
    else:
        walk.answers += 1
        if walk.answers > 1:
            walk.fail("more than one answer section")
        if not content.strip():
            walk.fail("empty answer section")
        elif protocol.boxed:
            boxes = [b for b in boxed(content) if b]
            if not boxes:
                walk.fail("answer without a box")
            elif len(set(boxes)) > 1:
                walk.fail("several different boxes in the answer")
