"""A trace that was written in one tool-call format, in another: the same steps, code, results and answer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import ValidationError

from retool.config import ProtocolConfig
from retool.errors import UserError
from retool.protocols import Call, ToolProtocol, build_protocol

if TYPE_CHECKING:
    from data_gen.trace import Trace


class TranslationError(UserError):
    """A trace whose calls or answer cannot be read in the format that it says it is in."""


def translated(trace: Trace, target: ToolProtocol) -> Trace:
    """`trace` in `target`'s format; itself when it is in that format already, or does not say in which it is.

    Raises `TranslationError`.
    """
    if trace.protocol is None:
        return trace
    try:
        source = build_protocol(ProtocolConfig.model_validate(dict(trace.protocol)))
    except ValidationError as error:
        raise TranslationError(f"trace {trace.id!r}: its protocol cannot be read; generate the traces again") from error
    if _hand(source) == _hand(target):
        return trace
    segments = list(trace.segments)
    for i in range(0, len(segments), 2):
        last = i == len(segments) - 1
        text = segments[i].text
        segments[i] = replace(
            segments[i], text=_answered(trace, text, source, target) if last else _call(trace, text, source, target)
        )
    return replace(trace, segments=tuple(segments), protocol=None)


def _hand(protocol: ToolProtocol) -> tuple[str, str]:
    """How a format writes."""
    return protocol.render_call("x\ny"), protocol.render_answer("x")


def _call(trace: Trace, text: str, source: ToolProtocol, target: ToolProtocol) -> str:
    call = source.parse(text)
    if not isinstance(call, Call):
        raise TranslationError(f"trace {trace.id!r} has a turn without a {source.name} call: {text[:80]!r}")
    written = text[: call.start] + target.render_call(call.code)
    again = target.parse(written)
    if not isinstance(again, Call) or again.code != call.code:
        raise TranslationError(
            f"trace {trace.id!r} cannot be written as {target.name}: its text or code holds that format's own marks; "
            "generate the traces again with this recipe"
        )
    return written


def _answered(trace: Trace, text: str, source: ToolProtocol, target: ToolProtocol) -> str:
    found = source.candidates(text)
    written = source.render_answer(found[-1]) if found else ""
    at = text.rfind(written) if written else -1
    if at < 0:
        raise TranslationError(
            f"trace {trace.id!r} does not end with an answer as {source.name} writes it; generate the traces again"
        )
    return text[:at] + target.render_answer(found[-1]) + text[at + len(written) :]
