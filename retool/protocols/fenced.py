r"""Tool calls as markdown: the format of tool-integrated reasoning (ToRA, arXiv 2309.17452, figure 2).

    ```python
    print(2 + 2)
    ```
    ```output
    4
    ```
    The answer is $\boxed{4}$.

A turn ends at the line that closes a fence. Decisions:

- Only a fence opened by ```` ```python ```` is a call; any other that closes on its own line ends the turn too and is
  answered with what was wrong, so that the policy goes on.
- An ```` ```output ```` fence that the policy writes is a forgery: never executed, never scored.
- An answer ends the episode: a call after it is not run.
- In questions and tool output three backticks are broken with a backslash: a page of markdown cannot close the fence.
"""

from __future__ import annotations

import re
import textwrap

from retool.config import ProtocolConfig
from retool.protocols.answers import AnswerRules, Found
from retool.protocols.base import Call, Malformed

FENCE = "```"
OPEN = "```python"
RESULT = "```output"
CLOSE = "\n```\n"

_BLOCK = re.compile(r"```python[ \t]*(?=\n)(?P<code>.*?)\n```\n", re.DOTALL)
_CODE = re.compile(r"```python[ \t]*\n.*?(?:\n```(?=\n|\Z)|\Z)", re.DOTALL)
_FORGED = re.compile(r"```output.*?(?:(?=```python)|```|\Z)", re.DOTALL)
_SEEN = re.compile(r"\n*```output\n.*?\n```\n", re.DOTALL)


class FencedProtocol(AnswerRules):
    """`ToolProtocol` over markdown fences."""

    name = "fenced"
    native = False
    tools = None

    def __init__(self, config: ProtocolConfig) -> None:
        super().__init__(config)
        self._instructions = config.instructions

    @property
    def stop(self) -> tuple[str, ...]:
        return (CLOSE,)

    @property
    def call_open(self) -> str:
        return OPEN

    @property
    def control(self) -> tuple[str, ...]:
        return (OPEN, RESULT, CLOSE, FENCE, *self.answer_tags)

    @property
    def strays(self) -> tuple[str, ...]:
        return (OPEN, RESULT, CLOSE)

    @property
    def single(self) -> tuple[str, ...]:
        return (OPEN, RESULT, FENCE, *self.answer_tags)

    def instructions(self) -> str:
        if self._instructions is not None:
            return self._instructions
        return (
            "Solve the problem step by step. Where a calculation is easier or safer by program, write Python:\n"
            f"{self.render_call('print(2 + 2)')}"
            "Each snippet is a complete script with its own imports that prints what you want to know; nothing is kept "
            f"from one snippet to the next. It is run for you and its output is shown in a fence that opens with "
            f"{RESULT}; go on from there. Never write that part yourself.\n"
            f"End with the final answer: {self.render_answer('your answer')}"
        )

    def user_message(self, question: str) -> str:
        instructions = self.instructions()
        return f"{instructions}\n\nProblem:\n{question}" if instructions else question

    def parse(self, turn_text: str) -> Call | Malformed | None:
        last = turn_text.rfind(CLOSE)
        if last < 0:
            return None
        end = last + len(CLOSE)
        previous = turn_text.rfind(CLOSE, 0, last + len(CLOSE) - 1)  # a block holds no closing line but its own
        block = _BLOCK.search(turn_text, 0 if previous < 0 else previous + len(CLOSE) - 1, end)
        start = last + 1 if block is None else block.start()
        before = turn_text[:start]
        if self.answer(before) is not None:
            return None  # answered: whatever comes after is not run
        if self.unfinished(before):
            return Malformed(f"no code found: call inside an unfinished {self.answer_open} section", start, end)
        if block is None:
            return Malformed(f"no code found: a call opens with {OPEN}, and {FENCE} on a line ends it", start, end)
        if OPEN in block.group("code"):
            return Malformed(f"no code found: {OPEN} inside {OPEN}", start, end)
        code = _tidy(block.group("code"))
        return Call(code, start, end) if code.strip() else Malformed("no code found", start, end)

    def observation(self, text: str) -> tuple[str, str, str]:
        return f"{RESULT}\n", text if text.endswith("\n") else f"{text}\n", f"{FENCE}\n"

    def forged(self, policy_text: str) -> bool:
        return RESULT in policy_text

    def strip_forged(self, policy_text: str) -> str:
        return _FORGED.sub("\n", policy_text)

    def prose(self, policy_text: str) -> str:
        return _CODE.sub("\n", policy_text)

    def render_call(self, code: str) -> str:
        return f"{OPEN}\n{code}{CLOSE}"

    def next_call(self, trace: str, at: int) -> Found | None:
        block = _BLOCK.search(trace, at, trace.rfind(CLOSE) + len(CLOSE))
        if block is None:
            return None
        code = block.group("code")
        return Found(block.start(), block.end(), _tidy(code), f"{FENCE} inside a call" if OPEN in code else "")

    def observation_end(self, trace: str, at: int) -> int | None:
        seen = _SEEN.match(trace, at)
        return None if seen is None else seen.end()


def _tidy(code: str) -> str:
    text = code.strip("\n").rstrip()
    return textwrap.dedent(text) if text[:1].isspace() else text
