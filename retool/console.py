"""What a person sees while work runs: a progress bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

console = Console(highlight=False, emoji=False)
errors = Console(stderr=True, highlight=False, emoji=False)
LINE_EVERY_S = 5.0

# Columns of the live line: (title, metric, format). A metric that a step lacks is left out.
COLUMNS = (
    ("reward", "rollout/score", "{:.2f}"),
    ("accuracy", "rollout/accuracy", "{:.2f}"),
    ("code", "rollout/code_ratio", "{:.2f}"),
    ("ok", "rollout/calls_ok", "{:.2f}"),
    ("length", "rollout/length", "{:.0f}"),
    ("entropy", "entropy", "{:.2f}"),
    ("kl", "approx_kl", "{:.4f}"),
    ("loss", "loss/nll", "{:.3f}"),
    ("gap", "max_logprob_gap", "{:.0e}"),
)


def metrics_line(metrics: Mapping[str, float]) -> str:
    """`reward 0.51  accuracy 0.54  ...` of the figures that are there."""
    return "  ".join(f"{title} {form.format(metrics[key])}" for title, key, form in COLUMNS if key in metrics)


class Bar:
    """Progress of one stage; `update(done, text)` may be called as often as one likes."""

    def __init__(self, title: str, total: int, progress: Progress | None) -> None:
        self.title, self.total, self._progress = title, max(total, 1), progress
        self._task = progress.add_task(title, total=self.total, note="") if progress is not None else None
        self._last = 0.0

    def update(self, done: int, text: str = "") -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, note=text)
        elif done >= self.total or time.monotonic() - self._last >= LINE_EVERY_S:
            self._last = time.monotonic()
            console.print(f"{self.title}: {done}/{self.total}  {text}", markup=False)


@contextmanager
def bar(title: str, total: int) -> Iterator[Bar]:
    """A progress bar for `total` units of work."""
    if not console.is_terminal:
        yield Bar(title, total, None)
        return
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(title, total, progress)


def table(title: str, header: list[str], rows: list[list[str]], figures: bool = True) -> Table:
    """A plain table; the first column is text, the others are figures or, with `figures=False`, text too."""
    out = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        out.add_column(name, justify="right" if figures and i > 0 else "left")
    for row in rows:
        out.add_row(*row)
    return out
