"""Does a chat template keep the exact prefix over turns? What was shown and sampled must stand unchanged, id by id, in
every later prompt; otherwise a conversation served turn by turn is not the one that was trained on.

`check_template(tokenizer)` renders small conversations, with and without tool calls, with and without thinking, and
reports the first token that differs.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from retool.config import ProtocolConfig
from retool.protocols.build import PROTOCOLS, build_protocol
from retool.protocols.codec import Codec
from retool.protocols.hermes import SCHEMA, TOOL, Frame, HermesProtocol
from retool.protocols.template import (
    CALL_IDS,
    FORMS,
    CodecError,
    FrameError,
    Message,
    opened_thinking,
    render,
    result_message,
    turn,
)
from retool.records import Problem

Verdict = Literal["kept", "broken", "unsupported"]

_QUESTIONS = ("What is 12 * 34?", "And 56 * 78?", "And the sum of both?")
_SAID = ("Let me compute that.", "Now the second one.")
_THOUGHTS = ("A product, so by program.", "Once more by program.")
_CODE = ("print(12 * 34)", "print(56 * 78)")
_RESULTS = ("it is 408", "it is 4368")
_CONTEXT = 12  # tokens shown before a difference


@dataclass(frozen=True)
class Difference:
    """The first token that differs. `turn` counts from 1, `token` from 0; texts and ids are "" and None at an end."""

    turn: int
    token: int
    before: str
    expected: str
    expected_id: int | None
    found: str
    found_id: int | None


@dataclass(frozen=True)
class Case:
    """One kind of conversation. `unsupported`: the template has no such conversations, so there is nothing to keep."""

    name: str
    verdict: Verdict
    why: str = ""
    difference: Difference | None = None


@dataclass(frozen=True)
class TemplateReport:
    """`kept`: every kind of conversation that the template has keeps its prefix. `protocols`: name → why it cannot be
    used with this template, or an empty text. `frame`: what stands around tool results in `hermes`."""

    cases: tuple[Case, ...]
    protocols: dict[str, str]
    declares_tools: bool
    opens_thinking: bool
    frame: Frame | None

    @property
    def kept(self) -> bool:
        verdicts = [c.verdict for c in self.cases]
        return "broken" not in verdicts and "kept" in verdicts

    def to_row(self) -> dict[str, Any]:
        protocols = {name: {"usable": not why, "why": why} for name, why in self.protocols.items()}
        return {**asdict(self), "protocols": protocols, "kept": self.kept}


def check_template(tokenizer: Any) -> TemplateReport:
    """`tokenizer`: a transformers tokenizer with a chat template. Raises `CodecError` when it renders nothing."""
    first: list[Message] = [{"role": "user", "content": _QUESTIONS[0]}]
    prompt = render(tokenizer, first, None)
    opened = opened_thinking(prompt)
    cases = [
        _case(tokenizer, opened, tools=tools, thinking=thinking)
        for tools in (False, True)
        for thinking in (False, True)
    ]
    protocols: dict[str, str] = {}
    frame: Frame | None = None
    for name in PROTOCOLS:
        try:
            codec = Codec(tokenizer, build_protocol(ProtocolConfig.model_validate({"name": name})))
            codec.prompt_ids(Problem("", "x", ""))
            protocols[name] = ""
        except CodecError as error:
            protocols[name] = error.why if isinstance(error, FrameError) else str(error)
            if name == "hermes":
                cases.append(_hermes_case(tokenizer, error))
            continue
        if isinstance(codec.protocol, HermesProtocol):
            frame = codec.protocol.frame
            cases.append(Case("hermes", "kept"))
    return TemplateReport(tuple(cases), protocols, _declares_tools(tokenizer, prompt), bool(opened), frame)


def _declares_tools(tokenizer: Any, prompt: str) -> bool:
    try:
        return TOOL in render(tokenizer, [{"role": "user", "content": _QUESTIONS[0]}], [SCHEMA]).replace(prompt, "")
    except CodecError:
        return False


def _hermes_case(tokenizer: Any, error: CodecError) -> Case:
    if not isinstance(error, FrameError):
        return Case("hermes", "unsupported", str(error))
    if not error.expected:
        return Case("hermes", "unsupported", error.why)
    return Case("hermes", "broken", error.why, _difference(tokenizer, error.turn, error.expected, error.found))


def _case(tokenizer: Any, opened: str, *, tools: bool, thinking: bool) -> Case:
    name = ("tool calls" if tools else "text") + (", thinking" if thinking else "")
    if opened and not thinking:
        return Case(name, "unsupported", "the generation prompt opens <think>: every turn thinks")
    first: Case | None = None
    for form in FORMS if thinking and not opened else FORMS[:1]:
        for as_json in (False, True) if tools else (False,):
            case = _talk(tokenizer, name, opened, form if thinking else None, tools, as_json)
            if case.verdict == "kept":
                return case
            if first is None or (first.verdict == "unsupported" and case.verdict == "broken"):
                first = case
    assert first is not None
    return first


def _talk(tokenizer: Any, name: str, opened: str, form: tuple[str, str] | None, tools: bool, as_json: bool) -> Case:
    """Two turns. `as_json`: the arguments of calls are given as a JSON string, as some templates want them."""
    schemas = [SCHEMA] if tools else None
    messages: list[Message] = [{"role": "user", "content": _QUESTIONS[0]}]
    try:
        prompt = render(tokenizer, messages, schemas)
        for i in range(2):
            sampled, content = turn(_SAID[i], _THOUGHTS[i], form, opened) if form else (_SAID[i], _SAID[i])
            reply: Message = {"role": "assistant", "content": content}
            if tools:
                arguments: Any = {"code": _CODE[i]}
                function = {"name": TOOL, "arguments": json.dumps(arguments) if as_json else arguments}
                reply["tool_calls"] = [{"id": CALL_IDS[i], "type": "function", "function": function}]
                messages += [reply, result_message(_RESULTS[i], i)]
            else:
                messages += [reply, {"role": "user", "content": _QUESTIONS[i + 1]}]
            later = render(tokenizer, messages, schemas)
            if tools and _CODE[i] not in later:
                return Case(name, "unsupported", "the template does not show tool calls")
            if tools and _RESULTS[i] not in later:
                return Case(name, "unsupported", "the template does not show the results of tools")
            expected = prompt + sampled
            if not later.startswith(expected):
                lost = form is not None and _THOUGHTS[i] not in later
                why = "earlier thinking is dropped" if lost else "an earlier turn is shown differently"
                return Case(name, "broken", why, _difference(tokenizer, i + 1, expected, later))
            if (found := _difference(tokenizer, i + 1, expected, later)) is not None:
                return Case(name, "broken", "the text is kept, but the tokenizer merges over the end of a turn", found)
            prompt = later
    except CodecError as error:
        return Case(name, "unsupported", str(error))
    return Case(name, "kept")


def _difference(tokenizer: Any, number: int, expected: str, found: str) -> Difference | None:
    """Where the ids of `found` leave those of `expected`; None when they begin with all of them."""
    wanted, given = (tokenizer.encode(text, add_special_tokens=False) for text in (expected, found))
    at = next((i for i, a in enumerate(wanted) if i >= len(given) or given[i] != a), None)
    if at is None:
        return None

    def shown(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    other = given[at] if at < len(given) else None
    return Difference(
        turn=number,
        token=at,
        before=shown(wanted[max(0, at - _CONTEXT) : at]),
        expected=shown([wanted[at]]),
        expected_id=wanted[at],
        found="" if other is None else shown([other]),
        found_id=other,
    )
