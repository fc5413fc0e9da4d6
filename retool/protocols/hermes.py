r"""Native tool calls: JSON between `<tool_call>` tags, and a `tool` message for the result, as the model's own chat
template shows it (Hermes 2 Pro function calling; Qwen, Granite, GLM and others follow it).

    <tool_call>
    {"name": "python", "arguments": {"code": "print(2 + 2)"}}
    </tool_call>

A turn ends at `</tool_call>`. What follows (the end of the assistant's message, the tool message, the next generation
prompt) is the delta that the template would have written: `retool/protocols/template.py` finds it, and `Codec` binds
it. Without a tokenizer the result stands between `<tool_response>` tags. Decisions:

- One call a turn; the last counts. Nested or stray tags and JSON that is no call are `Malformed`.
- Anything of the frame around a result that the policy writes itself is a forgery.
- An answer ends the episode: a call after it is not run.
"""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass
from typing import Any

from retool.config import ProtocolConfig
from retool.protocols.answers import AnswerRules, Found
from retool.protocols.base import Call, Malformed

OPEN, CLOSE = "<tool_call>", "</tool_call>"
RESULT_OPEN, RESULT_CLOSE = "<tool_response>", "</tool_response>"
TOOL = "python"
HEAD, TAIL = f'{OPEN}\n{{"name": "{TOOL}", "arguments": {{"code": "', f'"}}}}\n{CLOSE}'

_TAG = re.compile(f"{OPEN}|{CLOSE}")
_MARK = re.compile(r"</?[^<>\s]{1,40}>|\[/?[A-Z_]{3,40}\]")  # role markers and tags, as templates write them
_CALL = re.compile(f"{OPEN}.*?(?:{CLOSE}|\\Z)", re.DOTALL)

SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": TOOL,
        "description": "Runs a complete Python script and returns what it printed. Nothing is kept between scripts.",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string", "description": "The script; it prints what you want to know."}},
            "required": ["code"],
        },
    },
}


@dataclass(frozen=True)
class Frame:
    """What a chat template writes between the end of a call and the tool's result, and between that and the next
    turn. `json`: the result stands in a JSON string."""

    opening: str
    closing: str
    json: bool = False


NEUTRAL = Frame(f"\n{RESULT_OPEN}\n", f"\n{RESULT_CLOSE}\n")


class HermesProtocol(AnswerRules):
    """`ToolProtocol` over native tool calls. `framed` gives a copy that knows a chat template's frame."""

    name = "hermes"
    native = True

    def __init__(self, config: ProtocolConfig) -> None:
        super().__init__(config)
        self._instructions = config.instructions
        self.frame = NEUTRAL
        self._marks: tuple[str, ...] = (RESULT_OPEN, RESULT_CLOSE)

    def framed(self, frame: Frame, eos: str) -> HermesProtocol:
        """The same protocol in a chat template's frame; `eos` may end a turn and is no forgery."""
        own = copy.copy(self)
        own.frame = frame
        found = [m.group() for part in (frame.opening, frame.closing) for m in _MARK.finditer(part)]
        end = _MARK.match(frame.opening.lstrip())  # what ends the assistant's message
        ends = {eos} if end is None else {eos, end.group()}
        if not found and len(frame.opening.strip()) > 3:
            found = [frame.opening.strip()]
        own._marks = tuple(dict.fromkeys(m for m in (RESULT_OPEN, RESULT_CLOSE, *found) if m not in ends))
        return own

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        return None if self._instructions == "" else [SCHEMA]

    @property
    def stop(self) -> tuple[str, ...]:
        return (CLOSE,)

    @property
    def call_open(self) -> str:
        return OPEN

    @property
    def control(self) -> tuple[str, ...]:
        return (OPEN, CLOSE, *self._marks, *self.answer_tags)

    @property
    def strays(self) -> tuple[str, ...]:
        return (OPEN, CLOSE, *self._marks)

    @property
    def single(self) -> tuple[str, ...]:
        return (HEAD, TAIL, OPEN, CLOSE, RESULT_OPEN, RESULT_CLOSE, *self.answer_tags)

    def instructions(self) -> str:
        if self._instructions is not None:
            return self._instructions
        return (
            f"Solve the problem step by step. Where a calculation is easier or safer by program, call the tool "
            f"{TOOL}:\n"
            f"{self.render_call('print(2 + 2)')}\n"
            "Each script is complete, with its own imports, and prints what you want to know; nothing is kept from one "
            "call to the next. One call at a time: wait for its result and go on from there. Never write a result "
            "yourself.\n"
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
        start, problem, depth = -1, "", 0
        for tag in _TAG.finditer(turn_text, 0, end):
            if tag.group() == OPEN:
                problem = problem or (f"{OPEN} inside {OPEN}" if depth else "")
                start, depth = tag.start(), 1
            else:
                problem = problem or ("" if depth else f"{CLOSE} without {OPEN}")
                depth = 0
        begin = start if start >= 0 else last
        before = turn_text[:begin]
        if self.answer(before) is not None:
            return None  # answered: whatever comes after is not run
        if self.unfinished(before):
            problem = problem or f"call inside an unfinished {self.answer_open} section"
        if problem:
            return Malformed(f"no code found: {problem}", begin, end)
        code, problem = read_call(turn_text[start + len(OPEN) : last])
        return Malformed(problem, begin, end) if problem else Call(code, begin, end)

    def observation(self, text: str) -> tuple[str, str, str]:
        body = text.strip()
        if self.frame.json:
            body = json.dumps(body, ensure_ascii=False)[1:-1]
        return self.frame.opening, body, self.frame.closing

    def forged(self, policy_text: str) -> bool:
        return any(mark in policy_text for mark in self._marks)

    def strip_forged(self, policy_text: str) -> str:
        """Without whole forged results; what is left of a frame takes the rest of the text with it."""
        text = policy_text
        for opening, closing in ((self.frame.opening.strip(), self.frame.closing.strip()), (RESULT_OPEN, RESULT_CLOSE)):
            if opening in text and closing:
                text = re.sub(f"{re.escape(opening)}.*?(?:{re.escape(closing)}|\\Z)", "\n", text, flags=re.DOTALL)
        cut = min((at for mark in self._marks if (at := text.find(mark)) >= 0), default=None)
        return text if cut is None else text[:cut]

    def prose(self, policy_text: str) -> str:
        return _CALL.sub("\n", policy_text)

    def render_call(self, code: str) -> str:
        written = json.dumps(code, ensure_ascii=False)[1:-1]
        for tag in self.control:  # in JSON a tag can be written so that nothing sees a tag
            written = written.replace(tag, "".join(f"\\u{ord(c):04x}" for c in tag[:1]) + tag[1:])
        return f"{HEAD}{written}{TAIL}"

    def next_call(self, trace: str, at: int) -> Found | None:
        end = trace.find(CLOSE, at)
        start = trace.rfind(OPEN, at, end) if end >= 0 else -1
        if start < 0:
            return None
        code, problem = read_call(trace[start + len(OPEN) : end])
        return Found(start, end + len(CLOSE), code, "empty code" if problem == "no code found" else problem)

    def observation_end(self, trace: str, at: int) -> int | None:
        opening = self.frame.opening
        if not trace.startswith(opening, at):
            return None
        end = trace.find(self.frame.closing, at + len(opening))
        return None if end < 0 else end + len(self.frame.closing)


def read_call(body: str) -> tuple[str, str]:
    """(code, "") of the JSON of a call, or ("", what is wrong with it). The text may be hostile."""
    try:
        # Line breaks inside strings are forgiven: models write code as they know it.
        call = json.loads(body.strip(), strict=False)
    except json.JSONDecodeError as error:
        return "", f"no code found: the call is not JSON ({error.msg} at character {error.pos})"
    except (ValueError, RecursionError):
        return "", "no code found: the call is JSON that nobody can read"
    if not isinstance(call, dict):
        return "", 'no code found: write {"name": ..., "arguments": {...}}'
    if call.get("name") != TOOL:
        return "", f"no code found: the only tool is {TOOL!r}"
    arguments = call.get("arguments")
    if isinstance(arguments, str):  # some templates show arguments as a JSON string
        try:
            arguments = json.loads(arguments, strict=False)
        except (ValueError, RecursionError):
            return "", "no code found: `arguments` is not a JSON object"
    if not isinstance(arguments, dict) or not isinstance(code := arguments.get("code"), str):
        return "", "no code found: `arguments` needs a text `code`"
    if not code.strip():
        return "", "no code found"
    if any("\ud800" <= c <= "\udfff" for c in code):
        return "", "no code found: the code holds half of a character (a lone surrogate)"
    return code, ""
