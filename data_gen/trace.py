"""A trace: what a teacher demonstrates, as segments with an origin, and how it becomes a transcript.

One JSON object a line:

    {"id", "problem": {"id", "prompt", "answer", "source", "family"}, "segments": [{"origin", "text"}, ...],
     "tool_calls", "family", "protocol"}

Segments alternate like an episode: a turn of the teacher (origin `demo`, up to and including the string that ends its
call), then what the tool said (origin `tool`, the plain text that the sandbox gave), and so on; the last is a turn.
`protocol` holds the keys of the format that the turns are written in; it may be missing. A recipe with another format
gets them translated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from data_gen.translate import translated
from retool.errors import UserError
from retool.files import write_text
from retool.protocols import Codec, ToolProtocol
from retool.records import Problem
from retool.transcript import Span, Transcript

SegmentOrigin = Literal["demo", "tool"]


class DataError(UserError):
    """Traces that cannot be made or read; says which file and line, and what to do."""


@dataclass(frozen=True)
class Segment:
    """A run of text of one origin."""

    origin: SegmentOrigin
    text: str


@dataclass(frozen=True)
class Trace:
    """One demonstration."""

    id: str
    problem: Problem
    segments: tuple[Segment, ...]
    tool_calls: int
    family: str
    protocol: Mapping[str, Any] | None = None

    def to_row(self) -> dict[str, Any]:
        problem = {k: getattr(self.problem, k) for k in ("id", "prompt", "answer", "source", "family")}
        segments = [asdict(s) for s in self.segments]
        row = {
            "id": self.id,
            "problem": problem,
            "segments": segments,
            "tool_calls": self.tool_calls,
            "family": self.family,
        }
        return row if self.protocol is None else {**row, "protocol": dict(self.protocol)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Trace:
        """Raises `DataError` when fields are missing or segments do not alternate."""
        try:
            told = row["problem"]
            identity, prompt, answer, source, family = (
                str(told[k]) for k in ("id", "prompt", "answer", "source", "family")
            )
            problem = Problem(identity, prompt, answer, source, family)
            segments = tuple(Segment(s["origin"], str(s["text"])) for s in row["segments"])
            written = row.get("protocol")
            trace = cls(
                str(row["id"]),
                problem,
                segments,
                int(row["tool_calls"]),
                str(row["family"]),
                None if written is None else dict(written),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"not a trace ({type(error).__name__}: {error})") from error
        expected = tuple("tool" if i % 2 else "demo" for i in range(len(segments)))
        if not segments or len(segments) % 2 == 0 or tuple(s.origin for s in segments) != expected:
            raise DataError("segments must alternate demo, tool, demo, ... and end with demo")
        return trace

    @property
    def policy_text(self) -> str:
        """What the teacher wrote, without what the tool said."""
        return "".join(s.text for s in self.segments if s.origin == "demo")

    def rendered(self, protocol: ToolProtocol, escape: Callable[[str], str] = str) -> str:
        """The whole trace as text, observations in their tags; `escape` makes tool output harmless."""
        parts = (s.text if s.origin == "demo" else "".join(protocol.observation(escape(s.text))) for s in self.segments)
        return "".join(parts)


def trace_to_transcript(trace: Trace, codec: Codec) -> Transcript:
    """The ids that an episode would have produced turn by turn: prompt, then (turn, observation)*, last turn, end of
    text. Turns are `demo` spans with their code range; observations are `tool` spans and are not trained on. A trace in
    another format is translated first. Raises `DataError` for a turn before a result that makes no call."""
    trace = translated(trace, codec.protocol)
    transcript = Transcript([Span("prompt", codec.prompt_ids(trace.problem))])
    for position, segment in enumerate(trace.segments):
        turn = position // 2
        if segment.origin == "tool":
            shown = codec.observation_ids(segment.text, transcript.ids)
            transcript.append(Span("tool", shown, turn=turn, kind="observation"))
            continue
        ids = codec.demo_ids(segment.text)
        last = position == len(trace.segments) - 1
        call = None if last else codec.protocol.parse(segment.text)
        if call is None and not last:
            raise DataError(
                f"trace {trace.id!r} has a turn that makes no call as protocol.name={codec.protocol.name} writes it; "
                f"generate the traces again: {segment.text[:80]!r}"
            )
        code = codec.token_range(ids, call.start, call.end) if call is not None else None
        transcript.append(Span("demo", (*ids, codec.eos_id) if last else ids, turn=turn, code=code))
    return transcript


def load_traces(path: Path | str) -> list[Trace]:
    """Raises `DataError` for a missing, empty or broken file."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there are no traces at {path}; make them with `retool data generate RECIPE`")
    traces: list[Trace] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                traces.append(Trace.from_row(json.loads(line)))
            except (json.JSONDecodeError, DataError) as error:
                raise DataError(f"{path}, line {number}: {error}; repair the line or generate again") from error
    if not traces:
        raise DataError(f"{path} holds no traces; generate them again and look at what was rejected")
    return traces


def write_traces(path: Path, traces: Sequence[Trace]) -> None:
    """All or nothing: a temporary file beside it, then a rename."""
    write_text(path, "".join(json.dumps(t.to_row(), ensure_ascii=False) + "\n" for t in traces))
