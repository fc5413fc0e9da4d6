"""The demo's report: the table, the curves of SFT and RL, and the same problems before and after RL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from retool.entropy_law import EntropyLaw
from retool.protocols.codec import Codec
from retool.records import Trajectory
from retool.viewer.charts import bar_chart, line_chart
from retool.viewer.page import Page, trace_view

TRACES_A_FAMILY = 2
STAGES = ("base", "sft", "rl")
STAGE_NAMES = {"base": "untrained", "sft": "after SFT", "rl": "after RL"}


def demo_page(
    summary: dict[str, Any],
    sft_metrics: Sequence[dict[str, float]],
    rl_metrics: Sequence[dict[str, float]],
    evaluations: dict[str, dict[str, list[Trajectory]]],
    codec: Codec,
) -> Page:
    """Everything of `runs/demo/report.html`."""
    page = Page(
        "retool demo",
        "A small model learns, from right and wrong answers alone, when to call a Python interpreter and how. "
        "All figures are on problems it never saw; intervals are 95 %.",
    )
    page.tables = [
        ("Accuracy and tool use", *summary_rows(summary)),
        ("Where the time went", list(summary["seconds"]), [[f"{v} s" for v in summary["seconds"].values()]]),
        ("Guarantees of the rollout", list(summary["rollout"]), [[f"{v:g}" for v in summary["rollout"].values()]]),
    ]
    page.charts = [_accuracy_bars(summary), *rl_charts(rl_metrics), *_sft_chart(sft_metrics)]
    page.trace_groups = [
        (f"Traces {STAGE_NAMES[stage]}", _traces(evaluations[stage]["tool"], codec)) for stage in ("rl", "sft")
    ]
    return page


def rl_charts(metrics: Sequence[dict[str, float]]) -> list[str]:
    """Reward and accuracy, tool use, length, entropy over RL steps; what was not measured is left out."""

    def series(**keys: str) -> dict[str, list[float]]:
        return {
            name: [m.get(key, float("nan")) for m in metrics]
            for name, key in keys.items()
            if any(key in m for m in metrics)
        }

    wanted = (
        ("Who calls the tool, by family (mean of 5 steps)", by_family(metrics, "code_ratio"), True),
        ("Accuracy by family (mean of 5 steps)", by_family(metrics, "accuracy"), True),
        ("Training accuracy and reward", series(accuracy="rollout/accuracy", reward="rollout/score"), True),
        ("Tool use", {**series(code="rollout/code_ratio"), **series(**{"calls that ran": "rollout/calls_ok"})}, True),
        ("Length (tokens)", series(all="rollout/length", **{"written by the model": "rollout/model_length"}), False),
        ("Entropy", series(entropy="entropy"), False),
        ("Share of sampled groups that are mixed", series(mixed="dynamic/mixed"), True),
    )
    return [line_chart(title, data, bounded=bounded) for title, data, bounded in wanted if data]


def law_table(law: EntropyLaw | None) -> list[tuple[str, list[str], list[list[str]]]]:
    """The fit of reward on entropy as a table of a page; nothing when there was nothing to fit."""
    if law is None:
        return []
    header = ["law", "a", "b", "ceiling at entropy 0 (b - a)", "R²", "steps"]
    row = ["accuracy = -a exp(entropy) + b", *(f"{x:.3f}" for x in (law.a, law.b, law.ceiling, law.r2)), str(law.n)]
    return [("What entropy bought (2505.22617)", header, [row])]


def by_family(metrics: Sequence[dict[str, float]], key: str) -> dict[str, list[float]]:
    """A figure of each problem family over steps, smoothed."""
    names = sorted({k.split("/")[1] for m in metrics for k in m if k.startswith("family/") and k.endswith(key)})
    return {name: _smooth([m.get(f"family/{name}/{key}", math.nan) for m in metrics]) for name in names}


def _smooth(values: Sequence[float], width: int = 5) -> list[float]:
    """Trailing mean over the steps that have a value: a step may hold no problem of a family."""
    out = []
    for i in range(len(values)):
        recent = [v for v in values[max(0, i - width + 1) : i + 1] if math.isfinite(v)]
        out.append(sum(recent) / len(recent) if recent else math.nan)
    return out


def _sft_chart(metrics: Sequence[dict[str, float]]) -> list[str]:
    return [line_chart("SFT loss", {"loss": [m.get("loss/nll", float("nan")) for m in metrics]})] if metrics else []


def _accuracy_bars(summary: dict[str, Any]) -> str:
    stages = summary["stages"]
    families = list(stages["rl"]["by_family"])
    series = {}
    for stage, name in STAGE_NAMES.items():
        parts = [stages[stage]["by_family"][f]["tool"] for f in families]
        series[name] = [(p["accuracy"], p["ci95"][0], p["ci95"][1]) for p in parts]
    return bar_chart("Held-out accuracy by problem family, with the tool", families, series)


def _traces(trajectories: Sequence[Trajectory], codec: Codec) -> list[Any]:
    seen: dict[str, int] = {}
    out = []
    for t in trajectories:
        if seen.get(t.problem.family, 0) < TRACES_A_FAMILY:
            seen[t.problem.family] = seen.get(t.problem.family, 0) + 1
            out.append(trace_view(t, codec, f"{t.problem.family}: {t.problem.prompt}"))
    return out


def summary_rows(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the demo's table: problem family by family, stage by stage."""
    header = ["problems", "stage", "accuracy with tool", "calls the tool", "accuracy without"]
    rows = []
    for family in ("all", *summary["stages"]["rl"]["by_family"]):
        for stage in STAGES:
            figures = summary["stages"][stage]
            part = figures if family == "all" else figures["by_family"][family]
            low, high = part["tool"]["ci95"]
            rows.append(
                [
                    family if stage == STAGES[0] else "",
                    STAGE_NAMES[stage],
                    f"{part['tool']['accuracy']:.2f} ({low:.2f}–{high:.2f})",
                    f"{part['tool']['code_ratio']:.2f}",
                    f"{part['no_tool']['accuracy']:.2f}",
                ]
            )
    return header, rows
