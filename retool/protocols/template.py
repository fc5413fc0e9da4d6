"""What a chat template writes around tool results, and whether it keeps what the model was given and has written.

A native tool call needs the text between the end of a call and the next turn. It is found by rendering conversations
whose messages are placeholders; two turns must then render exactly as the stitched text says. A template that rewrites
or drops earlier messages has no such frame and is refused here, before anything is trained on ids that it would never
produce.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from retool.errors import UserError
from retool.protocols.base import ToolProtocol
from retool.protocols.hermes import CLOSE, TOOL, Frame, HermesProtocol

CALL_IDS = ("retool001", "retool002", "retool003")  # nine letters and digits: some templates insist
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
FORMS = (("<think>\n", "\n</think>\n\n"), ("\n<think>", "</think>\n"), ("<think>", "</think>"))
"""How families write a thought: what stands before it and after it."""
_THOUGHTS = ("A first thought.", "A second thought.")
_ASK = "A question?"
_RESULT = 'a result\n"quoted" \\ to its end'  # shows whether results are written as they are or as JSON
_SAID = ("Turn one.", "Turn two.")

Message = dict[str, Any]


class CodecError(UserError):
    """Text or a tokenizer that cannot be encoded safely; the message says what to do."""


class FrameError(CodecError):
    """A chat template that native tool calls cannot use. `expected`, `found`: the texts that differ, if any do,
    in turn `turn`."""

    def __init__(self, why: str, expected: str = "", found: str = "", turn: int = 1) -> None:
        super().__init__(
            f"protocol.name=hermes cannot use this chat template: {why}. `retool check-template MODEL` shows where; "
            "set model.chat_template to a template that keeps earlier turns, or protocol.name to tags or fenced"
        )
        self.why, self.expected, self.found, self.turn = why, expected, found, turn


def render(
    tokenizer: Any, messages: Sequence[Message], tools: list[dict[str, Any]] | None, *, generate: bool = True
) -> str:
    """The template's text; `generate`: with the assistant's opening at its end. Raises `CodecError`."""
    try:
        return str(
            tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, add_generation_prompt=generate)
        )
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise CodecError(f"the chat template refuses this conversation: {' '.join(str(error).split())}") from error


def thinks(tokenizer: Any) -> bool:
    """Whether the chat template does anything with thinking."""
    template = tokenizer.chat_template
    return THINK_CLOSE in (template if isinstance(template, str) else json.dumps(template))


def opened_thinking(prompt: str) -> str:
    """The `<think>` and what follows it when a prompt ends inside of one, else an empty text."""
    at = prompt.rfind(THINK_OPEN)
    return prompt[at:] if at >= 0 and THINK_CLOSE not in prompt[at:] else ""


def turn(text: str, thought: str, form: tuple[str, str], opened: str) -> tuple[str, str]:
    """(what the model samples, the message content that stands for it) of a turn that thinks and then says `text`."""
    sampled = f"{'' if opened else form[0]}{thought}{form[1]}{text}"
    return sampled, opened + sampled


def result_message(text: str, call: int) -> Message:
    """A tool's result."""
    return {"role": "tool", "name": TOOL, "tool_call_id": CALL_IDS[call], "content": text}


def bind(tokenizer: Any, protocol: ToolProtocol) -> ToolProtocol:
    """The protocol in the frame of this tokenizer's chat template. Raises `FrameError`."""
    assert isinstance(protocol, HermesProtocol)
    return protocol.framed(find_frame(tokenizer, protocol.tools), str(tokenizer.eos_token))


def find_frame(tokenizer: Any, tools: list[dict[str, Any]] | None) -> Frame:
    """Raises `FrameError` when the template does not keep turns, thinking included where it knows of thinking."""
    prompt = _rendered(tokenizer, [{"role": "user", "content": _ASK}], tools)
    opened = opened_thinking(prompt)
    if opened:
        return _verified(tokenizer, tools, prompt, opened, FORMS[0])
    frame = _verified(tokenizer, tools, prompt, opened, None)
    if thinks(tokenizer):
        refusals: list[FrameError] = []
        for form in FORMS:
            try:
                if _verified(tokenizer, tools, prompt, opened, form) == frame:
                    return frame
                refusals.append(FrameError("it shows the result of a tool differently after thinking"))
            except FrameError as error:
                refusals.append(error)
        raise refusals[0]
    return frame


def _verified(
    tokenizer: Any,
    tools: list[dict[str, Any]] | None,
    prompt: str,
    opened: str,
    form: tuple[str, str] | None,
) -> Frame:
    """The frame after one turn, and the proof that a second turn leaves the first as it was. `form`: how thoughts are
    written, None for turns without."""
    messages: list[Message] = [{"role": "user", "content": _ASK}]
    stitched = prompt
    frame: Frame | None = None
    for i, said in enumerate(_SAID):
        call = f"{said}<tool_call>\n{{}}\n{CLOSE}"
        sampled, content = turn(call, _THOUGHTS[i], form, opened) if form else (call, call)
        messages += [{"role": "assistant", "content": content}, result_message(_RESULT, i)]
        text = _rendered(tokenizer, messages, tools)
        stitched += sampled
        if not text.startswith(stitched):
            what = "thinking" if form and _THOUGHTS[i] not in text else "turns"
            raise FrameError(f"it does not keep earlier {what} as the model wrote them", stitched, text, i + 1)
        if frame is None:
            frame = _frame_of(text[len(stitched) :])
        body = json.dumps(_RESULT, ensure_ascii=False)[1:-1] if frame.json else _RESULT
        stitched += f"{frame.opening}{body}{frame.closing}"
        if text != stitched:
            raise FrameError("it shows a second result differently from the first", stitched, text, i + 1)
    assert frame is not None
    return frame


def _frame_of(text: str) -> Frame:
    """The frame in what follows a turn."""
    for shown, is_json in ((_RESULT, False), (json.dumps(_RESULT, ensure_ascii=False)[1:-1], True)):
        if text.count(shown) == 1:
            opening, _, closing = text.partition(shown)
            if not opening.strip() or not closing.strip():
                raise FrameError("nothing separates a tool's result from the turns around it")
            return Frame(opening, closing, is_json)
    raise FrameError("it does not show the result of a tool, or not as it is")


def _rendered(tokenizer: Any, messages: Sequence[Message], tools: list[dict[str, Any]] | None) -> str:
    try:
        return render(tokenizer, messages, tools)
    except CodecError as error:
        raise FrameError(str(error)) from error
