# SPDX-License-Identifier: Apache-2.0
"""Bars and dots of the benchmarks, as images. Needs matplotlib, and nothing of ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLORS = ["#1a6faf", "#e8963e", "#c8553d", "#9aa0a6", "#5b8c5a", "#7a5195"]


@dataclass(frozen=True)
class Panel:
    """The same cases on one device: a value per case for every series, NaN where there is none."""

    title: str
    series: dict[str, Sequence[float]]


def save_bars(
    path: Path, title: str, unit: str, cases: Sequence[str], panels: Sequence[Panel], metadata: dict[str, str]
) -> None:
    """Bars of every series, a group for each case, the panels side by side."""
    panels = [Panel(one.title, {k: v for k, v in one.series.items() if not all(map(math.isnan, v))}) for one in panels]
    labels = list(dict.fromkeys(label for panel in panels for label in panel.series))
    height = 0.84 / len(labels)
    size = (2.6 + 5.4 * len(panels), 1.4 + 0.12 * len(cases) * (len(labels) + 1))
    figure, all_axes = _figure(size, len(panels))
    for axes, panel in zip(all_axes, panels):
        for number, label in enumerate(labels):
            values = panel.series.get(label, [math.nan] * len(cases))
            places = [case + (number + 0.5) * height - 0.42 for case in range(len(cases))]
            drawn = [0.0 if math.isnan(value) else value for value in values]
            axes.barh(places, drawn, 0.92 * height, label=label, color=COLORS[number % len(COLORS)])
            for place, value in zip(places, values):
                if not math.isnan(value):
                    axes.text(value, place, f" {value:.3g}", va="center", fontsize=6)
        axes.set_yticks(range(len(cases)), cases, fontsize=7)
        axes.set_ylim(len(cases) - 0.5, -0.5)
        axes.set_xlabel(unit, fontsize=8)
        axes.set_title(panel.title, fontsize=8)
    handles, names = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(labels), fontsize=7, frameon=False)
    _save(figure, title, path, metadata)


def save_ratios(
    path: Path, title: str, rows: Sequence[str], points: dict[str, Sequence[Sequence[float]]], metadata: dict[str, str]
) -> None:
    """A row of dots for every row, by series: how many times faster each case is, on a logarithmic axis with 1 in
    bold."""
    figure, (axes,) = _figure((8, 1.2 + 0.34 * len(rows)), 1)
    axes.axvline(1.0, color="black", linewidth=1.0, zorder=1)
    for number, (label, series) in enumerate(points.items()):
        offset = (number + 0.5) * 0.6 / len(points) - 0.3
        flat = [(ratio, row + offset) for row, ratios in enumerate(series) for ratio in ratios]
        x, y = zip(*flat) if flat else ((), ())
        axes.scatter(x, y, s=14, alpha=0.65, linewidth=0, label=label, color=COLORS[number % len(COLORS)], zorder=2)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [tick for tick in (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 50, 100) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks], fontsize=7)
    axes.minorticks_off()
    axes.grid(axis="x", color="#dddddd", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("slower  ←  times as fast, a dot for each case  →  faster", fontsize=8)
    figure.legend(loc="outside lower center", ncols=len(points), fontsize=7, frameon=False)
    _save(figure, title, path, metadata)


def _figure(size: tuple[float, float], columns: int) -> tuple[Any, Sequence[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(1, columns, figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axes in all_axes[0]:
        axes.tick_params(axis="x", labelsize=7)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(all_axes[0])


def _save(figure: Any, title: str, path: Path, metadata: dict[str, str]) -> None:
    from matplotlib import pyplot

    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=100, metadata=metadata)
    pyplot.close(figure)
