"""Small line charts as inline SVG images (matplotlib), so that a page needs no script and no network."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PALETTE = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed")


def line_chart(title: str, series: Mapping[str, Sequence[float]], ylabel: str = "", bounded: bool = False) -> str:
    """A chart of named series over steps as a `data:` URI. `bounded`: the y axis is 0..1. Other numbers are gaps."""
    fig, ax = plt.subplots(figsize=(4.6, 2.5), layout="constrained")
    try:
        for color, (name, values) in zip(PALETTE * 3, series.items(), strict=False):
            ys = [v if math.isfinite(v) else math.nan for v in values]
            ax.plot(range(1, len(ys) + 1), ys, label=name, color=color, linewidth=1.4)
        ax.set_title(title, fontsize=10, loc="left")
        ax.set_xlabel("step", fontsize=8)
        ax.set_ylabel(ylabel, fontsize=8)
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.25)
        if bounded:
            ax.set_ylim(-0.03, 1.03)
        if len(series) > 1:
            ax.legend(fontsize=8, frameon=False)
        return _svg(fig)
    finally:
        plt.close(fig)


def bar_chart(title: str, groups: Sequence[str], series: Mapping[str, Sequence[tuple[float, float, float]]]) -> str:
    """Grouped bars of (value, low, high) on a 0..1 axis as a `data:` URI."""
    fig, ax = plt.subplots(figsize=(6.4, 2.6), layout="constrained")
    try:
        width = 0.8 / max(len(series), 1)
        for i, (name, values) in enumerate(series.items()):
            xs = [g + (i - (len(series) - 1) / 2) * width for g in range(len(groups))]
            errors = [[max(v - lo, 0) for v, lo, _ in values], [max(hi - v, 0) for v, _, hi in values]]
            ax.bar(
                xs, [v for v, _, _ in values], width * 0.92, yerr=errors, label=name, color=PALETTE[i % 5], capsize=2
            )
        ax.set_xticks(range(len(groups)), groups, fontsize=9)
        ax.set_ylim(0, 1.03)
        ax.set_title(title, fontsize=10, loc="left")
        ax.tick_params(labelsize=8)
        ax.grid(axis="y", alpha=0.25)
        ax.legend(fontsize=8, frameon=False, ncols=len(series))
        return _svg(fig)
    finally:
        plt.close(fig)


def _svg(fig: plt.Figure) -> str:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
