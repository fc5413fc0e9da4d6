"""Look at a file of traces: numbers, and a few samples to read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from data_gen.trace import load_traces


def inspect(path: Path | str, samples: int = 3) -> dict[str, Any]:
    """Statistics and the first traces with and without a tool call, as plain data for printing.

    `families`: name → traces and the share of them that call the tool. Lengths are characters of the teacher's text.
    Raises `DataError`.
    """
    traces = load_traces(path)
    count = Counter(t.family for t in traces)
    with_tool = Counter(t.family for t in traces if t.tool_calls)
    lengths = sorted(len(t.policy_text) for t in traces)
    shown = [*[t for t in traces if t.tool_calls][:samples], *[t for t in traces if not t.tool_calls][:samples]]
    return {
        "path": str(path),
        "traces": len(traces),
        "problems": len({t.problem.id for t in traces}),
        "tool_share": sum(with_tool.values()) / len(traces),
        "calls": sum(t.tool_calls for t in traces),
        "characters": {"median": median(lengths), "max": lengths[-1]},
        "families": {f: {"traces": n, "tool_share": with_tool[f] / n} for f, n in sorted(count.items())},
        "samples": [t.to_row() for t in shown],
    }
