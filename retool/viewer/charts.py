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


def heat_map(title: str, names: Sequence[str], matrix: Sequence[Sequence[float]]) -> str:
    """A square of values in -1..1 with their numbers, as a `data:` URI; what is not a number stays empty."""
    side = 1.8 + 0.42 * len(names)
    fig, ax = plt.subplots(figsize=(side + 0.8, side), layout="constrained")
    try:
        image = ax.imshow([list(row) for row in matrix], cmap="RdBu", vmin=-1, vmax=1)
        ax.set_xticks(range(len(names)), names, fontsize=8, rotation=60, ha="right", rotation_mode="anchor")
        ax.set_yticks(range(len(names)), names, fontsize=8)
        for y, row in enumerate(matrix):
            for x, value in enumerate(row):
                if math.isfinite(value):
                    color = "white" if abs(value) > 0.7 else "black"
                    ax.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
        ax.set_title(title, fontsize=10, loc="left")
        fig.colorbar(image, ax=ax, shrink=0.7).ax.tick_params(labelsize=8)
        return _svg(fig)
    finally:
        plt.close(fig)


def range_chart(
    panels: Mapping[str, Mapping[str, tuple[float, float, float]]], lines: Mapping[str, float | None] | None = None
) -> str:
    """Side by side, a panel of (value, low, high) a name each, names from top to bottom, as a `data:` URI. `lines`:
    a vertical line in some panels."""
    names = list(dict.fromkeys(name for values in panels.values() for name in values))
    size = (4.2 * len(panels) + 1.6, 0.9 + 0.24 * len(names))
    fig, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", sharey=True, squeeze=False)
    try:
        for ax, (title, values) in zip(axes[0], panels.items(), strict=True):
            for name, (value, low, high) in values.items():
                y = names.index(name)
                ax.plot([low, high], [y, y], color=PALETTE[0], alpha=0.45, linewidth=2)
                ax.plot([value], [y], "o", color=PALETTE[0], markersize=4)
            if (line := (lines or {}).get(title)) is not None:
                ax.axvline(line, color="#6b7280", linestyle="--", linewidth=1)
            ax.set_yticks(range(len(names)), names, fontsize=8)
            ax.set_title(title, fontsize=10, loc="left")
            ax.tick_params(labelsize=8)
            ax.grid(alpha=0.25)
        axes[0][0].invert_yaxis()
        return _svg(fig)
    finally:
        plt.close(fig)


def _svg(fig: plt.Figure) -> str:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
