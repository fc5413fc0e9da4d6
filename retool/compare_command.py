"""`retool compare`: the table in the terminal, compare.json, a heat map and a page."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape

from retool.compare import TOKEN_KINDS, Comparison, compare
from retool.console import console, table
from retool.entropy_law import fit_run
from retool.files import writable_folder, write_json, write_text
from retool.rollout.step_ledger import read_steps
from retool.run_folder import LEDGER
from retool.stored_run import StoredRun
from retool.train import set_threads
from retool.viewer.charts import heat_map
from retool.viewer.demo_page import law_table
from retool.viewer.page import Page, render

HEADER = [
    "objective",
    "family",
    "gradient norm",
    "tokens with gradient",
    "spread",
    *TOKEN_KINDS,
    "clipped after a step",
]


def run_compare(run: Path, names: Sequence[str], steps: Sequence[int] | None, out: Path | None) -> Comparison:
    """Raises `UserError` for a folder that is no run, unknown objectives or steps."""
    stored = StoredRun(run)
    set_threads(stored.recipe)
    result = compare(stored, names, steps)
    folder = out or run / "compare"
    writable_folder(folder)
    print_comparison(result)
    metrics = [r.metrics for r in read_steps(run / LEDGER) if r.metrics is not None]
    write_json(folder / "compare.json", as_json(result))
    page = comparison_page(result)
    page.tables += law_table(fit_run(metrics))
    if result.rows:
        uri = page.charts[0]
        (folder / "compare.svg").write_bytes(base64.b64decode(uri.partition(",")[2]))
    write_text(folder / "compare.html", render(page))
    console.print(
        f"wrote {folder / 'compare.html'}, compare.json{', compare.svg' if result.rows else ''}", markup=False
    )
    return result


def as_json(result: Comparison) -> dict[str, Any]:
    """Plain values; a cosine that does not exist is null."""
    cosine = [[None if math.isnan(x) else round(x, 6) for x in row] for row in result.cosine]
    rows = [{**asdict(r), "max_logprob_gap": r.max_logprob_gap if math.isfinite(r.max_logprob_gap) else None}
            for r in result.rows]  # fmt: skip
    names = [r.name for r in result.rows]
    about = {"run": result.run, "steps": list(result.steps), "weights": result.weights, "age": result.age}
    about["trajectories"] = result.trajectories
    return {**about, "objectives": rows, "cosine": {"names": names, "matrix": cosine}, "not_comparable": result.refused}


def figures(result: Comparison) -> list[list[str]]:
    """Rows under `HEADER`."""
    return [
        [
            r.name,
            r.family,
            f"{r.norm:.4g}",
            f"{r.effective} of {r.tokens}",
            f"{r.spread:.0f}",
            *(f"{r.shares[k]:.2f}" for k in TOKEN_KINDS),
            "one update only" if r.clipped is None else f"{r.clipped:.4f}",
        ]
        for r in result.rows
    ]


def age_note(result: Comparison) -> str:
    """A sentence when the weights are not those that sampled the rollouts, else nothing."""
    if result.age == 0:
        return ""
    return (
        f"The weights are {abs(result.age)} steps {'newer' if result.age > 0 else 'older'} than the oldest rollouts. "
    )


def print_comparison(result: Comparison) -> None:
    """Figures, cosines, notes and what could not be compared."""
    steps = ", ".join(map(str, result.steps))
    if result.rows:
        rows = [[escape(cell) for cell in row] for row in figures(result)]
        console.print(table(f"{result.trajectories} trajectories of step {steps}", HEADER, rows))
        names = [r.name for r in result.rows]
        cells = [[escape(n), *(_cosine(x) for x in row)] for n, row in zip(names, result.cosine, strict=True)]
        console.print(table("cosine of the gradients", ["", *map(escape, names)], cells))
    if result.age:
        console.print(f"{age_note(result)}({result.weights})", markup=False, soft_wrap=True)
    for row in result.rows:
        for note in row.notes:
            console.print(f"{row.name}: {note}", markup=False, soft_wrap=True)
    for name, reason in result.refused.items():
        console.print(f"not comparable: {name}: {reason}", markup=False, soft_wrap=True)


def comparison_page(result: Comparison) -> Page:
    """The same as a page, with the heat map."""
    steps = ", ".join(map(str, result.steps))
    page = Page(
        "Objectives on the same rollouts",
        f"{result.trajectories} trajectories of step {steps} of {result.run}, weights of {result.weights}. "
        f"{age_note(result)}Every objective saw the same trajectories, weights and micro-batches. A token's weight is "
        "the derivative of the loss, without the KL to the reference, by its log-probability; spread is (sum |w|)^2 / "
        "sum w^2.",
    )
    page.tables = [("Gradients and tokens", HEADER, figures(result))] if result.rows else []
    notes = [[r.name, note] for r in result.rows for note in r.notes]
    if notes:
        page.tables.append(("Notes", ["objective", "note"], notes))
    if result.refused:
        page.tables.append(("Not comparable", ["objective", "reason"], [[n, r] for n, r in result.refused.items()]))
    if result.rows:
        page.charts = [heat_map("cosine of the gradients", [r.name for r in result.rows], result.cosine)]
    return page


def _cosine(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"
