"""Tool calls between tags: the format of ReTool (arXiv 2504.11536), with tags that can be chosen.

A turn that ends a call stops at the closing code tag. What is run is the text between the last opening and the last
closing tag, without its markdown fence if it has one. Decisions that the paper leaves open:

- Opening and closing code tags must alternate up to the call: nested or stray tags are `Malformed`, and so is a call
  inside an unfinished answer section.
- An answer section ends the episode: a call written after one is not run (`parse` gives None).
- Text after the closing tag belongs to the sampled token that completed it and is ignored.
- Observation tags written by the policy are forgeries: never executed, never scored.
"""

from __future__ import annotations

import re
import textwrap
from functools import cached_property

from retool.config import ProtocolConfig
from retool.errors import UserError
from retool.protocols import grammar
from retool.protocols.base import Call, Malformed
from retool.protocols.boxed import boxed

_FENCED = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)(?:```|\Z)", re.IGNORECASE | re.DOTALL)


class ProtocolError(UserError):
    """A protocol that cannot be built; the message says what to change."""


class TagProtocol:
    """`ToolProtocol` over six tags. `fence`: calls are written with a markdown fence and one tag a line."""

    name = "tags"
    native = False
    tools = None

    def __init__(self, config: ProtocolConfig) -> None:
        tags = (*config.code, *config.observation, *config.answer)
        if any(not t or t != t.strip() or len(t) < 2 for t in tags):
            raise ProtocolError(f"protocol tags need two characters or more and no outer spaces, got {tags}")
        if clash := next(((a, b) for i, a in enumerate(tags) for j, b in enumerate(tags) if i != j and a in b), None):
            raise ProtocolError(f"protocol tags must differ and not contain one another: {clash[0]!r} and {clash[1]!r}")
        self.code_open, self.code_close = config.code
        self.observation_open, self.observation_close = config.observation
        self.answer_open, self.answer_close = config.answer
        self.fence = config.fence
        self.boxed = config.boxed
        self._instructions = config.instructions

    @property
    def stop(self) -> tuple[str, ...]:
        return (self.code_close,)

    @property
    def call_open(self) -> str:
        return self.code_open

    @property
    def control(self) -> tuple[str, ...]:
        return (
            self.code_open,
            self.code_close,
            self.observation_open,
            self.observation_close,
            self.answer_open,
            self.answer_close,
        )

    @property
    def single(self) -> tuple[str, ...]:
        return self.control

    def instructions(self) -> str:
        if self._instructions is not None:
            return self._instructions
        example = self.render_call("print(2 + 2)")
        answer = self.render_answer("your answer")
        return (
            "Solve the problem step by step. Where a calculation is easier or safer by program, write Python:\n"
            f"{example}\n"
            "Each snippet is a complete script with its own imports that prints what you want to know; nothing is kept "
            "from one snippet to the next. It is run for you and its output is shown between "
            f"{self.observation_open} and {self.observation_close}; go on from there. Never write that part yourself.\n"
            f"End with the final answer:\n{answer}"
        )

    def user_message(self, question: str) -> str:
        instructions = self.instructions()
        return f"{instructions}\n\nProblem:\n{question}" if instructions else question

    @cached_property
    def _tag(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(t) for t in self.control))

    def parse(self, turn_text: str) -> Call | Malformed | None:
        marks = [(m.group(), m.start(), m.end()) for m in self._tag.finditer(turn_text)]
        last = max((i for i, m in enumerate(marks) if m[0] == self.code_close), default=None)
        if last is None:
            return None
        in_code, in_answer = False, False
        start, problem = -1, ""
        for tag, begin, end in marks[: last + 1]:
            if tag == self.answer_close and in_answer and not in_code:
                return None  # answered: whatever comes after is not run
            if tag == self.answer_open:
                in_answer = True
            elif tag == self.code_open:
                problem = problem or (f"{tag} inside {tag}" if in_code else "")
                in_code, start = True, begin
                body = end
            elif tag == self.code_close:
                problem = problem or ("" if in_code else f"{tag} without {self.code_open}")
                in_code = False
                close = (begin, end)
        if in_answer and not problem:
            problem = f"call inside an unfinished {self.answer_open} section"
        if problem:
            return Malformed(f"no code found: {problem}", start if start >= 0 else close[0], close[1])
        code = self._unfence(turn_text[body : close[0]])
        if not code.strip():
            return Malformed("no code found", start, close[1])
        return Call(code, start, close[1])

    def _unfence(self, region: str) -> str:
        """Without a markdown fence; text around a fence is dropped. No fence: the text as it is, dedented."""
        text = region.strip()
        if text.startswith("```"):
            first, _, rest = text.partition("\n")
            text = rest if rest or first.strip("`").strip().lower() in ("", "python", "python3", "py") else first[3:]
            text = text.rstrip().removesuffix("```")
        elif fences := _FENCED.findall(region):
            text = fences[-1]
        else:
            text = region
        text = text.strip("\n").rstrip()
        return textwrap.dedent(text) if text[:1].isspace() else text

    def observation(self, text: str) -> tuple[str, str, str]:
        if not self.fence:
            return self.observation_open, text, self.observation_close
        body = text if text.endswith("\n") else f"{text}\n"
        return f"\n{self.observation_open}\n", body, f"{self.observation_close}\n\n"

    def forged(self, policy_text: str) -> bool:
        return self.observation_open in policy_text or self.observation_close in policy_text

    def strip_forged(self, policy_text: str) -> str:
        if not self.forged(policy_text):
            return policy_text
        return _strip_blocks(policy_text, self.observation_open, self.observation_close, self._tag)

    def _sections(self, policy_text: str) -> list[str]:
        """Closed answer sections, in order. Opening tags inside a section start it anew."""
        sections: list[str] = []
        start: int | None = None
        for mark in self._tag.finditer(policy_text):
            if mark.group() == self.answer_open:
                start = mark.end()
            elif mark.group() == self.answer_close and start is not None:
                sections.append(policy_text[start : mark.start()].strip())
                start = None
        return sections

    def answer(self, policy_text: str) -> str | None:
        return sections[-1] if (sections := self._sections(policy_text)) else None

    def candidates(self, policy_text: str) -> list[str]:
        section = self.answer(policy_text)
        if self.boxed:
            if section is None:  # a box inside code is no answer
                section = _strip_blocks(policy_text, self.code_open, self.code_close, self._tag)
            return [b for b in boxed(section) if b]
        return [section] if section else []

    def render_call(self, code: str) -> str:
        if self.fence:
            return f"{self.code_open}\n```python\n{code}\n```\n{self.code_close}"
        return f"{self.code_open}{code}{self.code_close}"

    def render_answer(self, answer: str) -> str:
        inner = f"\\boxed{{{answer}}}" if self.boxed else answer
        line = "\n" if self.fence else ""
        return f"{self.answer_open}{line}{inner}{line}{self.answer_close}"

    def check(self, trace: str) -> list[str]:
        return grammar.check(trace, self)


def _strip_blocks(text: str, opening: str, closing: str, tag: re.Pattern[str]) -> str:
    """`text` without `opening...closing` blocks; an unclosed block ends at the next tag, a stray tag goes alone.

    One linear pass. A newline takes a block's place, so that what stood around it cannot join into something new.
    """
    kept: list[str] = []
    position = 0
    marks = list(tag.finditer(text))
    closers = [i for i, m in enumerate(marks) if m.group() == closing]
    index, next_closer = 0, 0
    while index < len(marks):
        mark = marks[index]
        index += 1
        if mark.group() not in (opening, closing):
            continue
        kept.append(text[position : mark.start()])
        position = mark.end()
        if mark.group() == opening:
            while next_closer < len(closers) and closers[next_closer] < index:
                next_closer += 1
            if next_closer < len(closers):
                index = closers[next_closer] + 1
                position = marks[index - 1].end()
            else:
                position = marks[index].start() if index < len(marks) else len(text)
        kept.append("\n")
    kept.append(text[position:])
    return "".join(kept)
