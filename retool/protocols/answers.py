r"""Where `fenced` and `hermes` read the answer, and whether a trace of theirs is fit for imitation.

With `boxed`, the last `\boxed{...}` outside calls is the answer: what mathematics models write anyway. Without it the
answer is a section between two tags, as in `tags`. What a thinking model writes before its last `</think>` is no
answer: thoughts try things out.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

from retool.config import ProtocolConfig
from retool.errors import UserError
from retool.protocols.boxed import boxed_spans

_PRINT = re.compile(r"\bprint\s*\(")
_THINK_OPEN, _THINK_CLOSE = "<think>", "</think>"
_PUNCTUATION = re.compile(r"[\s$.)\]\\]*")  # what may stand behind the answer: `$\boxed{4}$.`


@dataclass(frozen=True)
class Found:
    """A call in a whole trace; `problem` says why it cannot be read, otherwise `code` is what it runs."""

    start: int
    end: int
    code: str = ""
    problem: str = ""


class AnswerRules(ABC):
    """The half of a `ToolProtocol` that has to do with answers and whole traces."""

    def __init__(self, config: ProtocolConfig) -> None:
        self.boxed = config.boxed
        self.answer_open, self.answer_close = config.answer
        tags = config.answer
        if any(not t or t != t.strip() or len(t) < 2 for t in tags) or tags[0] in tags[1] or tags[1] in tags[0]:
            raise UserError(f"protocol.answer needs two different tags without outer spaces, got {tags}")

    @property
    def answer_tags(self) -> tuple[str, ...]:
        return () if self.boxed else (self.answer_open, self.answer_close)

    @abstractmethod
    def prose(self, policy_text: str) -> str:
        """The text without calls: a box or a tag in code is no answer."""

    @abstractmethod
    def next_call(self, trace: str, at: int) -> Found | None:
        """The first call of a trace from position `at` on."""

    @abstractmethod
    def observation_end(self, trace: str, at: int) -> int | None:
        """Where the observation ends that begins at `at`, or None when none begins there."""

    @property
    @abstractmethod
    def strays(self) -> tuple[str, ...]:
        """Strings that a good trace holds in calls and observations only."""

    def _spans(self, text: str) -> list[tuple[int, int, int]]:
        """(start, end, end of what closes it) of every answer in a text without calls."""
        if self.boxed:
            return [(a, b, b + 1) for a, b in boxed_spans(text) if text[a:b].strip()]
        found: list[tuple[int, int, int]] = []
        start: int | None = None
        for mark in re.finditer(f"{re.escape(self.answer_open)}|{re.escape(self.answer_close)}", text):
            if mark.group() == self.answer_open:
                start = mark.end()
            elif start is not None:
                found.append((start, mark.start(), mark.end()))
                start = None
        return found

    def _said(self, policy_text: str) -> str:
        """The text without calls and thoughts."""
        prose = self.prose(policy_text).rpartition(_THINK_CLOSE)[2]
        return prose.partition(_THINK_OPEN)[0]

    def unfinished(self, text: str) -> bool:
        """Whether an answer section is open at the end of a text (never with boxes)."""
        if self.boxed:
            return False
        prose = self._said(text)
        return prose.rfind(self.answer_open) > prose.rfind(self.answer_close)

    def answer(self, policy_text: str) -> str | None:
        prose = self._said(policy_text)
        return prose[spans[-1][0] : spans[-1][1]].strip() if (spans := self._spans(prose)) else None

    def candidates(self, policy_text: str) -> list[str]:
        prose = self._said(policy_text)
        found = [prose[a:b].strip() for a, b, _ in self._spans(prose)]
        return [a for a in (found if self.boxed else found[-1:]) if a]

    def render_answer(self, answer: str) -> str:
        return f"\\boxed{{{answer}}}" if self.boxed else f"{self.answer_open}{answer}{self.answer_close}"

    def check(self, trace: str) -> list[str]:
        """Every reason why `trace` is not `text (call observation text)* answer`; empty when it is."""
        reasons: dict[str, None] = {}
        answers, at, tail = 0, 0, ""
        while True:
            call = self.next_call(trace, at)
            text = trace[at:] if call is None else trace[at : call.start]
            spans = self._spans(text)
            answers += len(spans)
            if spans:
                tail = text[spans[-1][2] :]
                if any(not text[a:b].strip() for a, b, _ in spans):
                    reasons["empty answer section"] = None
            elif answers:
                tail += text
            reasons.update(
                dict.fromkeys(f"{s.strip()} outside a call and its result" for s in self.strays if s in text)
            )
            if call is None:
                break
            if answers:
                reasons["a call after the answer"] = None
            reasons.update(dict.fromkeys(_code_problems(call)))
            seen = self.observation_end(trace, call.end)
            if seen is None:
                reasons["a call without its observation"] = None
            at = call.end if seen is None else seen
        if answers == 0:
            reasons["no answer"] = None
        elif answers > 1:
            reasons["more than one answer"] = None
        elif not (_PUNCTUATION.fullmatch(tail) if self.boxed else not tail.strip()):
            reasons["text after the answer"] = None
        return list(reasons)


def _code_problems(call: Found) -> list[str]:
    if call.problem:
        return [call.problem]
    if not call.code.strip():
        return ["empty code"]
    return [] if _PRINT.search(call.code) else ["code that prints nothing"]
