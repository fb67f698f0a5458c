# SPDX-License-Identifier: Apache-2.0
"""`--html` of `flashinfer misses`: one page with everything in it, drawn without a script or a file from elsewhere, so
that it can be mailed and opened on a machine without a network. Charts are bars of HTML and lines of SVG."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from flashinfer.aot import advice
from flashinfer.aot.records import Summary, Tally
from flashinfer.aot.suggest import Suggestion
from flashinfer.cli._text import count, size
from flashinfer.version import __version__

_MAX_BARS = 20
_MAX_COLUMNS = 96  # of the timeline: hours, else days, else weeks and so on
_WIDTH, _HEIGHT = 720, 220
_LEFT, _BOTTOM, _TOP = 56, 24, 10

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60646c; --line: #d9d9e0; --paper: #fff; --card: #f6f6f8;
  --compile: #2b6cb0; --waiting: #dd8b1f; --other: #8f96a3; --mark: #c0392b }
@media (prefers-color-scheme: dark) { :root { --ink: #edeef0; --soft: #a4a9b3; --line: #3a3d44; --paper: #17181b;
  --card: #212226; --compile: #63a4e8; --waiting: #f0ad4e; --other: #7b818c; --mark: #ff7b6b } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 24px 20px 48px; max-width: 1080px; background: var(--paper); color: var(--ink);
  font: 14px/1.5 system-ui, sans-serif }
h1 { font-size: 22px; margin: 0 0 4px } h2 { font-size: 16px; margin: 36px 0 8px } p { margin: 4px 0 12px }
.soft { color: var(--soft) }
.figures { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0 }
.figure { background: var(--card); border-radius: 8px; padding: 10px 16px; min-width: 130px }
.figure b { display: block; font-size: 22px; font-weight: 600 }
.bars { display: grid; grid-template-columns: minmax(120px, 2fr) 3fr max-content; gap: 5px 10px; align-items: center }
.name { overflow-wrap: anywhere; font-size: 12px; line-height: 1.3 }
.bar { display: flex; height: 16px } .bar i { min-width: 1px }
.value { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.compile { background: var(--compile) } .waiting { background: var(--waiting) } .other { background: var(--other) }
.key { margin-right: 14px; white-space: nowrap }
.key i { display: inline-block; width: 10px; height: 10px; margin-right: 5px }
svg { width: 100%; height: auto; max-width: 860px; display: block } svg text { fill: var(--soft); font-size: 11px }
code { font-family: ui-monospace, monospace; font-size: 12.5px; overflow-wrap: anywhere }
ol li { margin-bottom: 8px }
@media (max-width: 640px) { .bars { grid-template-columns: 1fr max-content } .name { grid-column: 1 / -1 } }
"""


def page(summary: Summary, found: Suggestion, budget: int | None = None) -> str:
    """The page of a report, or of a suggestion within a budget.

    Args:
        found: what to add; of a report its candidates alone, which make the curve.
    """
    body = [_head(summary), _steps(summary), _by_kernel(summary), _by_reason(summary)]
    body += [_coverage(summary, found, budget), _timeline(summary)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Kernels that were not precompiled</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _head(summary: Summary) -> str:
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    waited = sum(kernel.waited for kernel in summary.kernels)
    compiled = sum(kernel.compiled for kernel in summary.kernels)
    figures = [
        (f"{summary.seconds:,.1f} s", "lost to misses"),
        (f"{compiled:,.1f} s", "of them compiling"),
        (f"{waited:,.1f} s", "waiting for a compile"),
        (f"{len(summary.kernels):,}", "kernels missed"),
        (f"{len(summary.processes):,}", "processes"),
    ]
    cards = "".join(f'<div class="figure"><b>{value}</b>{text}</div>' for value, text in figures)
    broken = f" {count(summary.broken, 'unreadable line')} left out." if summary.broken else ""
    return (
        "<h1>Kernels that were not precompiled</h1>"
        f'<p class="soft">flashinfer {escape(__version__)}, {now}.{broken}</p><div class="figures">{cards}</div>'
    )


def _steps(summary: Summary) -> str:
    items = [
        f"<li><code>{escape(step.what)}</code><br>{_seconds(step.seconds)}, {count(len(step.kernels), 'kernel')}: "
        f"{escape(step.reasons[0])}{f', and {len(step.reasons) - 1} like it' if len(step.reasons) > 1 else ''}</li>"
        for step in advice.steps(summary.kernels)
    ]
    return f"<h2>What to do</h2><ol>{''.join(items)}</ol>"


# ----------------------------------------------------------------------------------------------------------------- bars


@dataclass(frozen=True)
class _Bar:
    name: str
    parts: Sequence[tuple[str, float]]  # class and seconds
    note: str

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds in self.parts)


def _bars(bars: Sequence[_Bar]) -> str:
    longest = max((bar.seconds for bar in bars), default=0.0) or 1.0
    rows = []
    for bar in bars:
        parts = "".join(
            f'<i class="{kind}" style="width:{100 * seconds / longest:.2f}%" title="{kind}: {seconds:.2f} s"></i>'
            for kind, seconds in bar.parts
            if seconds > 0
        )
        rows.append(
            f'<div class="name">{escape(bar.name)}</div><div class="bar">{parts}</div>'
            f'<div class="value">{_seconds(bar.seconds)} <span class="soft">{escape(bar.note)}</span></div>'
        )
    return f'<div class="bars">{"".join(rows)}</div>'


def _by_kernel(summary: Summary) -> str:
    shown = summary.kernels[:_MAX_BARS]
    bars = [
        _Bar(f"{kernel.name} {kernel.spec['target']}", _parts(kernel), count(len(kernel.processes), "process"))
        for kernel in shown
    ]
    left = summary.kernels[_MAX_BARS:]
    more = f"<p>and {len(left)} more, {_seconds(sum(kernel.seconds for kernel in left))}</p>" if left else ""
    keys = (("compile", "compiling"), ("waiting", "waiting for another process"), ("other", "lookup and loading"))
    legend = "".join(f'<span class="key"><i class="{kind}"></i>{text}</span>' for kind, text in keys)
    return f"<h2>Seconds by kernel</h2><p>{legend}</p>{_bars(bars)}{more}"


def _parts(kernel: Tally) -> list[tuple[str, float]]:
    other = max(0.0, kernel.seconds - kernel.compiled - kernel.waited)
    return [("compile", kernel.compiled), ("waiting", kernel.waited), ("other", other)]


def _by_reason(summary: Summary) -> str:
    reasons: dict[str, float] = {}
    for kernel in summary.kernels:
        for reason, seconds in kernel.reasons.items():
            reasons[reason] = reasons.get(reason, 0.0) + seconds
    costliest = sorted(reasons.items(), key=lambda item: -item[1])[:_MAX_BARS]
    bars = [_Bar(reason, [("compile", seconds)], _share(seconds, summary.seconds)) for reason, seconds in costliest]
    return f"<h2>Seconds by reason</h2>{_bars(bars)}"


# --------------------------------------------------------------------------------------------------------------- curves


def _coverage(summary: Summary, found: Suggestion, budget: int | None) -> str:
    total = summary.seconds
    points = [(0, 0.0)]
    for one in found.all:
        points.append((points[-1][0] + one.bytes, points[-1][1] + one.seconds))
    title = "<h2>Seconds saved by bytes added</h2>"
    if len(points) == 1 or not total:
        return title + "<p>Adding kernels saves nothing here.</p>"
    most = max(points[-1][0], 1)
    line = " ".join(f"{_x(num_bytes / most):.1f},{_y(seconds / total):.1f}" for num_bytes, seconds in points)
    marks = []
    if budget is not None and found.chosen:
        x, y = _x(min(1.0, found.bytes / most)), _y(found.seconds / total)
        anchor, shift = ("end", -8) if x > _WIDTH / 2 else ("start", 8)
        text = f"suggested: {count(len(found.chosen), 'kernel')}, {size(found.bytes)}, {_share(found.seconds, total)}"
        marks.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_y(0):.1f}" stroke="var(--mark)" '
            'stroke-dasharray="4 4"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="var(--mark)"/>'
            f'<text x="{x + shift:.1f}" y="{min(y + 18, _y(0) - 6):.1f}" text-anchor="{anchor}">{text}</text>'
        )
    ticks = [(fraction, size(fraction * most)) for fraction in (0.0, 0.25, 0.5, 0.75, 1.0)]
    chart = f'<polyline points="{line}" fill="none" stroke="var(--compile)" stroke-width="2"/>{"".join(marks)}'
    rest = max(0.0, 1 - points[-1][1] / total)
    remain = f" {100 * rest:.1f} % need another step." if rest >= 0.0005 else ""
    return (
        f"{title}<p>The kernels that save most per byte first, {count(len(found.all), 'kernel')} in all, for "
        f"{escape(', '.join(found.targets))}.{remain}</p>"
        + _chart(chart, ticks, [f"{part} %" for part in range(0, 101, 25)])
    )


def _timeline(summary: Summary) -> str:
    title = "<h2>Seconds over time</h2>"
    if not summary.hours:
        return title
    first, last = min(summary.hours), max(summary.hours)
    steps = itertools.chain((1, 6, 24), range(168, 1 << 62, 168))
    step = next(hours for hours in steps if (last - first) // hours < _MAX_COLUMNS)
    begin = first - first % step
    columns = (last - begin) // step + 1
    sums = [0.0] * columns
    for hour, seconds in summary.hours.items():
        sums[(hour - begin) // step] += seconds
    highest = max(sums) or 1.0
    wide = (_WIDTH - _LEFT) / columns
    bars = []
    for column, seconds in enumerate(sums):
        top = _y(seconds / highest)
        bars.append(
            f'<rect x="{_LEFT + column * wide:.1f}" y="{top:.1f}" width="{max(0.5, wide - 1):.1f}" '
            f'height="{_y(0) - top:.1f}" fill="var(--compile)"><title>{_when(begin + column * step, step)}: '
            f"{seconds:.2f} s</title></rect>"
        )
    shown = sorted({0, columns // 2, columns - 1})
    ticks = [((column + 0.5) / columns, _when(begin + column * step, step)) for column in shown]
    unit = {1: "an hour", 6: "six hours", 24: "a day"}.get(step, f"{step // 168} weeks")
    labels = [f"{highest * part / 4:.3g} s" for part in range(5)]
    return f"{title}<p>A column is {unit}, in UTC.</p>" + _chart("".join(bars), ticks, labels)


def _when(hour: int, step: int) -> str:
    try:
        moment = datetime.datetime.fromtimestamp(hour * 3600, datetime.timezone.utc)
    except (ValueError, OverflowError, OSError):  # a clock that was wrong
        return "?"
    return moment.strftime("%Y-%m-%d" if step >= 24 else "%Y-%m-%d %H:00")


def _chart(content: str, ticks: Iterable[tuple[float, str]], labels: Sequence[str]) -> str:
    """Axes around it: ticks below, by their fraction of the width, and labels at the left at even distances."""
    grid = []
    for number, label in enumerate(labels):
        y = _y(number / (len(labels) - 1))
        grid.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        )
    for fraction, label in ticks:
        anchor = "start" if fraction < 0.1 else "end" if fraction > 0.9 else "middle"
        grid.append(f'<text x="{_x(fraction):.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{label}</text>')
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(grid)}{content}</svg>'


def _x(fraction: float) -> float:
    return _LEFT + fraction * (_WIDTH - _LEFT)


def _y(fraction: float) -> float:
    return _HEIGHT - _BOTTOM - fraction * (_HEIGHT - _BOTTOM - _TOP)


def _seconds(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds < 100 else f"{seconds:,.0f} s"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""
