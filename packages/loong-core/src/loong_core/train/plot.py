"""Line charts as plain SVG text, drawn once here; a script of the page only adds hover values.

Colours are classes (`s0`, `s1`, ...), so that the page decides them for light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 12, 30
_MOST_POINTS = 1200


@dataclass(frozen=True, kw_only=True)
class Series:
    """A named line through the points whose y is a number; a None breaks it.

    `marked` draws every point; `faint` a thin pale line, for raw values behind their smoothed course. `hover` series
    show their values under the pointer.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    color: int = 0
    marked: bool = False
    faint: bool = False
    hover: bool = True


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Several series over the same x axis. `unit` follows every value; `zero` starts the y axis at 0."""

    title: str
    series: tuple[Series, ...]
    unit: str = ""
    zero: bool = False
    note: str = ""


def number(value: float) -> str:
    """A value in few characters, four significant digits: `0.01235`, `12.34k`, `3.000e-05`."""
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-3:
        return f"{value:.3g}" if float(f"{value:.3g}") == value else f"{value:.3e}"
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            scale = 1e3 if letter == "k" else unit
            return f"{value / scale:.4g}{letter}"
    return f"{value:.4g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers in [low, high], about `count` of them."""
    span = high - low
    # Below this span neighbouring ticks would be written alike, and their indices would not be exact.
    if not math.isfinite(span) or span <= 1e-9 * max(abs(low), abs(high)):
        return [low]
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def thin_out(series: Series) -> Series:
    """At most about a thousand points, the lowest and highest of every stretch, so that no spike is lost."""
    if len(series.x) <= _MOST_POINTS:
        return series
    size = math.ceil(len(series.x) / (_MOST_POINTS // 2))
    kept: list[int] = []
    for start in range(0, len(series.x), size):
        stretch = range(start, min(start + size, len(series.x)))
        valued = [(value, index) for index in stretch if (value := series.y[index]) is not None]
        if valued:
            kept += sorted({min(valued)[1], max(valued)[1]})
        else:
            kept.append(start)
    return Series(
        name=series.name,
        x=[series.x[index] for index in kept],
        y=[series.y[index] for index in kept],
        color=series.color,
        marked=series.marked,
        faint=series.faint,
        hover=series.hover,
    )


@dataclass(frozen=True)
class _Frame:
    """The ranges of a chart and the way from values to pixels."""

    low_x: float
    high_x: float
    low_y: float
    high_y: float

    def x(self, value: float) -> float:
        share = (value - self.low_x) / (self.high_x - self.low_x) if self.high_x > self.low_x else 0.5
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.low_y) / (self.high_y - self.low_y)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)


def _frame(chart: Chart) -> _Frame | None:
    xs = [x for series in chart.series for x in series.x]
    ys = [y for series in chart.series for y in series.y if y is not None]
    if not ys:
        return None
    low, high = (min(0.0, *ys) if chart.zero else min(ys)), max(ys)
    if high <= low:
        margin = abs(high) * 0.1 or 1.0
        low, high = (low if chart.zero and low == 0 else low - margin), high + margin
    else:
        margin = (high - low) * 0.05
        low, high = (low if chart.zero and low == 0 else low - margin), high + margin
    return _Frame(min(xs), max(xs), low, high)


def svg(chart: Chart) -> str:
    """The chart as an `<svg>` element; says so in words when there is nothing to draw."""
    chart = Chart(
        title=chart.title,
        series=tuple(thin_out(series) for series in chart.series),
        unit=chart.unit,
        zero=chart.zero,
        note=chart.note,
    )
    frame = _frame(chart)
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">'
    if frame is None:
        return f'{head}<text class="empty" x="{WIDTH // 2}" y="{HEIGHT // 2}">no values</text></svg>'
    parts = [head, *_axes(frame)]
    for series in chart.series:
        parts += _line(series, frame)
    parts.append(f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    return "".join([*parts, "</svg>"])


def _axes(frame: _Frame) -> list[str]:
    parts = []
    for value in ticks(frame.low_y, frame.high_y):
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick y" x="{LEFT - 8}" y="{y + 4}">{escape(number(value))}</text>')
    for value in ticks(frame.low_x, frame.high_x, 6):
        if value == int(value):
            x = frame.x(value)
            parts.append(f'<text class="tick x" x="{x}" y="{HEIGHT - 10}">{escape(number(value))}</text>')
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    return parts


def _line(series: Series, frame: _Frame) -> list[str]:
    strokes: list[list[str]] = [[]]
    points: list[str] = []
    for x, y in zip(series.x, series.y, strict=True):
        if y is None:
            strokes.append([])
            continue
        place = frame.x(x), frame.y(y)
        strokes[-1].append(f"{place[0]},{place[1]}")
        points.append(f'<circle class="s{series.color}" cx="{place[0]}" cy="{place[1]}" r="3.5"/>')
    kind = f"s{series.color}{' faint' if series.faint else ''}"
    lines = [f'<polyline class="{kind}" points="{" ".join(stroke)}"/>' for stroke in strokes if len(stroke) > 1]
    # A value between two gaps has no line through it: a dot shows it.
    lonely = [
        f'<circle class="s{series.color}" cx="{stroke[0].split(",")[0]}" cy="{stroke[0].split(",")[1]}" r="1.5"/>'
        for stroke in strokes
        if len(stroke) == 1
    ]
    return lines + (points if series.marked else lonely)


def hover_data(chart: Chart) -> dict[str, Any]:
    """What the page's script needs to show values: the frame, and the points of every series that hovers."""
    thinned = [thin_out(series) for series in chart.series]
    frame = _frame(Chart(title=chart.title, series=tuple(thinned), zero=chart.zero))
    if frame is None:
        return {}
    return {
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "width": WIDTH,
        "low": frame.low_x,
        "high": frame.high_x,
        "unit": chart.unit,
        "series": [
            {"name": series.name, "color": series.color, "x": list(series.x), "y": list(series.y)}
            for series in thinned
            if series.hover
        ],
    }
