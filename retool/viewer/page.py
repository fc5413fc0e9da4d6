"""One offline HTML page from figures, charts and traces. Autoescaped, and with a policy that forbids scripts: a trace
that holds `</script><img onerror=...>` is inert text."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import jinja2

from retool.protocols.codec import Codec
from retool.records import Trajectory


@dataclass(frozen=True)
class TracePart:
    """A run of text and how it is coloured: prompt, policy, code, observation."""

    kind: str
    text: str


@dataclass(frozen=True)
class TraceView:
    """A trajectory ready to be shown."""

    title: str
    verdict: str  # right, wrong, unknown
    parts: tuple[TracePart, ...]
    notes: str = ""


@dataclass
class Page:
    """What a page shows, from top to bottom."""

    title: str
    lead: str = ""
    tables: list[tuple[str, list[str], list[list[str]]]] = field(default_factory=list)
    charts: list[str] = field(default_factory=list)
    trace_groups: list[tuple[str, list[TraceView]]] = field(default_factory=list)


def render(page: Page) -> str:
    """The page as HTML text."""
    env = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = files("retool.viewer").joinpath("templates/page.html.j2").read_text(encoding="utf-8")
    return env.from_string(source).render(page=page)


def trace_view(trajectory: Trajectory, codec: Codec, title: str = "") -> TraceView:
    """Split a trajectory into coloured parts; the code ranges come from the ledger, not from a second parser."""
    parts: list[TracePart] = []
    for span in trajectory.transcript.spans:
        if span.origin == "policy" and span.code is not None:
            a, b = span.code
            for kind, ids in (("policy", span.ids[:a]), ("code", span.ids[a:b]), ("policy", span.ids[b:])):
                if ids:
                    parts.append(TracePart(kind, codec.decode(ids)))
        else:
            kind = {"prompt": "prompt", "policy": "policy", "demo": "policy"}.get(span.origin, "observation")
            parts.append(TracePart(kind, codec.decode(span.ids)))
    return TraceView(title or trajectory.problem.prompt, verdict(trajectory), tuple(parts), _notes(trajectory))


def verdict(trajectory: Trajectory) -> str:
    reward: Any = trajectory.reward
    if reward is None or reward.accuracy is None:
        return "unknown"
    return "right" if reward.accuracy == 1.0 else "wrong"


def _notes(t: Trajectory) -> str:
    calls = ", ".join(f"{c.status} in {c.run_ms:.0f} ms" for c in t.tool_calls) or "no call"
    score = f"score {t.reward.score:.2f}" if t.reward is not None else "no score"
    return f"{t.status}; {calls}; {score}; reference answer {t.problem.answer}"
