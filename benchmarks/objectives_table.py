"""The results of benchmarks/objectives.py as Markdown and as a picture."""

from __future__ import annotations

import base64
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from retool.objectives import PRESETS
from retool.viewer.charts import range_chart

COLUMNS = (
    ("reward", ("reward_first", "reward_last"), "{:.2f}"),
    ("entropy", ("entropy_first", "entropy_last"), "{:.2f}"),
    ("length", ("length",), "{:.0f}"),
    ("code", ("code_ratio",), "{:.2f}"),
    ("KL to start", ("kl_to_start",), "{:.4f}"),
    ("clipped", ("clip_fraction",), "{:.4f}"),
    ("explained variance", ("explained_variance_first", "explained_variance_last"), "{:.2f}"),
    ("s", ("seconds",), "{:.0f}"),
    ("tokens", ("tokens",), "{:.0f}"),
)


def tables(data: Mapping[str, Any], verdicts: Sequence[Mapping[str, Any]]) -> str:
    """The whole of benchmarks/objectives.md."""
    s, start = data["settings"], data["start"]
    lines = [
        "# Every objective on the demo task",
        "",
        f"`python -m benchmarks.objectives`: {s['steps']} RL steps of {s['prompts']} problems x {s['group_size']} "
        f"trajectories, {s['updates']} updates each, learning rate {s['lr']:g}, one start checkpoint, live sandbox. "
        f"Held-out accuracy on {s['held_out']} problems, 95 % interval of one run; the start has "
        f"{_interval(start)}. Two values: the first three and the last three steps. A short budget on a small model: "
        "it shows that each objective trains and moves its own quantity, not which is best. Changes that this budget "
        "forced on presets stand in `benchmarks/objectives_run.py` (`scaled`, `TWEAKS`, `VARIANTS`).",
        "",
        "![held-out accuracy and entropy](objectives.svg)",
        "",
        "## Figures (first seed)",
        "",
        _row(["preset", "family", "held-out accuracy", *(c[0] for c in COLUMNS)]),
        _row(["---"] * 2 + ["---:"] * (1 + len(COLUMNS))),
    ]
    for name, runs in data["runs"].items():
        run = runs[min(runs, key=int)]
        family = PRESETS[name].family if name in PRESETS else "baseline"
        lines.append(
            _row([f"`{name}`", family, _interval(run), *(_cell(run, keys, form) for _, keys, form in COLUMNS)])
        )
    lines += ["", "## Predictions", "", "Paired differences over seeds with their 95 % t interval. Shown: at least "]
    lines[-1] += "three seeds and an interval that excludes 0 on the predicted side; contrary: on the other side."
    lines += [
        "",
        _row(["prediction", "verdict", "figure", "preset", "baseline", "difference", "seeds"]),
        _row(["---"] * 7),
    ]
    for v in verdicts:
        figures = ["", "", ""] if "difference" not in v else [f"{v['ours']:.4g}", f"{v['theirs']:.4g}", _difference(v)]
        lines.append(_row([v["claim"], v["verdict"], f"`{v['metric']}`", *figures, str(v["seeds"])]))
    failed = data.get("failed", [])
    if failed:
        lines += ["", "## Failed", "", *(f"- `{f['run'][0]}`, seed {f['run'][1]}: {f['why']}" for f in failed)]
    return "\n".join(lines) + "\n"


def picture(data: Mapping[str, Any]) -> bytes:
    """Held-out accuracy with intervals, and entropy from first to last, as SVG."""
    first = {name: runs[min(runs, key=int)] for name, runs in data["runs"].items()}
    spent = {
        name: [r["entropy_last"] for r in runs.values() if r["entropy_last"] is not None]
        for name, runs in data["runs"].items()
    }
    last = {n: statistics.fmean(values) for n, values in spent.items() if values}
    uri = range_chart(
        {
            "held-out accuracy (95 %)": {n: (r["accuracy"], *r["ci95"]) for n, r in first.items()},
            "entropy at the end (mark: at the start)": {
                n: (v, min(v, first[n]["entropy_first"]), max(v, first[n]["entropy_first"])) for n, v in last.items()
            },
        },
        {"held-out accuracy (95 %)": data["start"].get("accuracy")},
    )
    return base64.b64decode(uri.partition(",")[2])


def _interval(figures: Mapping[str, Any]) -> str:
    if not figures:
        return "–"
    low, high = figures["ci95"]
    return f"{figures['accuracy']:.2f} ({low:.2f}–{high:.2f})"


def _cell(run: Mapping[str, Any], keys: Sequence[str], form: str) -> str:
    values = [run.get(k) for k in keys]
    return " → ".join(form.format(v) for v in values if v is not None) or "–"


def _difference(verdict: Mapping[str, Any]) -> str:
    text = f"{verdict['difference']:+.4g}"
    return text if verdict["ci95"] is None else f"{text} ({verdict['ci95'][0]:+.4g} to {verdict['ci95'][1]:+.4g})"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
