"""Plots as SVG, made of text: lines over the points of a sweep, bars where there is one point, and distributions.

Colours are the page's, by the classes s0, s1, ...; nothing is loaded from anywhere.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

NUM_COLORS = 8
_WIDTH, _HEIGHT = 520, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 12, 44
_BAR, _LABEL = 22, 150  # of the bar chart: a bar's height, and the room for its name
_DODGE = 4  # pixels between the whiskers of neighbouring targets
_QUANTILES = [index / 50 for index in range(51)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """`half_width` is that of the interval around `value`; None draws no whisker. A value of None leaves a gap."""

    label: str
    value: float | None
    half_width: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One target's points, in the order of the sweep, and its colour's number."""

    label: str
    color: int
    points: Sequence[Point]


def draw(series: Sequence[Series], *, unit: str) -> str:
    """Lines over a sweep; bars where there is a single point to compare."""
    return _draw_bars(series, unit=unit) if len(series[0].points) == 1 else _draw_lines(series, unit=unit)


def draw_distributions(samples: Sequence[tuple[str, int, Sequence[float]]], *, unit: str) -> str:
    """What share of the values lies below each value; a label, a colour's number and the values for each line.

    The axis ends at the largest 99th percentile: what lies beyond is in the table.
    """
    drawn = [(label, color, sorted(values)) for label, color, values in samples if values]
    if not drawn:
        return ""
    end = _nice_end(max(_quantile(values, 0.99) for _, _, values in drawn))
    axes = _Axes(x_end=end, y_end=1.0)
    parts = [axes.grid(y_labels=lambda value: f"{value:.0%}"), axes.x_ticks(unit)]
    for label, color, values in drawn:
        points = [(min(_quantile(values, share), end), share) for share in _QUANTILES]
        parts.append(f"<g>{axes.path(points, color)}<title>{escape(label)}</title></g>")
    return _svg(_WIDTH, _HEIGHT, parts, title=f"share of values below, {unit}")


def _draw_lines(series: Sequence[Series], *, unit: str) -> str:
    labels = [point.label for point in series[0].points]
    axes = _Axes(x_end=len(labels) - 1, y_end=_find_end(series), inset=30)
    parts = [axes.grid(y_labels=_tick)]
    parts += [
        f'<text class="tick" text-anchor="middle" x="{axes.x(i):.1f}" y="{_HEIGHT - 24}">{escape(label)}</text>'
        for i, label in enumerate(labels)
    ]
    for one in series:
        known = [(i, point) for i, point in enumerate(one.points) if point.value is not None]
        parts.append(axes.path([(i, point.value or 0.0) for i, point in known], one.color, dodge=_DODGE * one.color))
        parts += [_mark(axes, i, point, one) for i, point in known]
    return _svg(_WIDTH, _HEIGHT, parts, title=unit)


def _mark(axes: "_Axes", position: float, point: Point, series: Series) -> str:
    """A dot, its interval, and the figures for a pointer that rests on it."""
    assert point.value is not None
    x, told = axes.x(position) + _DODGE * series.color, f"{series.label}, {point.label}: {_tick(point.value)}"
    whisker = ""
    if point.half_width is not None:
        low = axes.y(max(point.value - point.half_width, 0.0))
        high = axes.y(min(point.value + point.half_width, axes.y_end))
        caps = f"M{x - 3:.1f} {low:.1f}h6M{x - 3:.1f} {high:.1f}h6"
        whisker = f'<path class="line s{series.color} thin" d="M{x:.1f} {low:.1f}V{high:.1f}{caps}"/>'
        told += f" ±{_tick(point.half_width)}"
    dot = f'<circle class="dot s{series.color}" cx="{x:.1f}" cy="{axes.y(point.value):.1f}" r="4"/>'
    return f"<g>{whisker}{dot}<title>{escape(told)}</title></g>"


def _draw_bars(series: Sequence[Series], *, unit: str) -> str:
    end = _find_end(series)
    height = (_BAR + 8) * len(series) + 12
    room = _WIDTH - _LABEL - 110
    parts = []
    for number, one in enumerate(series):
        point, y = one.points[0], number * (_BAR + 8) + 6
        parts.append(f'<text class="name" x="0" y="{y + 15}">{escape(_cut(one.label, 22))}</text>')
        value = point.value or 0.0
        length = value / end * room
        told = "-" if point.value is None else _tick(value)
        if point.half_width is not None:
            told += f" ±{_tick(point.half_width)}"
        parts.append(
            f'<rect class="bar s{one.color}" x="{_LABEL}" y="{y}" width="{length:.1f}" height="{_BAR}" rx="2"/>'
        )
        parts.append(f'<text class="value" x="{_LABEL + length + 6:.1f}" y="{y + 15}">{told}</text>')
    return _svg(_WIDTH, height, parts, title=unit)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Axes:
    """From values to places; both axes begin at 0, or differences would look larger than they are."""

    x_end: float
    y_end: float
    inset: float = 0.0  # between the frame and the first and last value

    def x(self, value: float) -> float:
        room = _WIDTH - _LEFT - _RIGHT - 2 * self.inset
        return _LEFT + self.inset + (value / self.x_end * room if self.x_end else room / 2)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - value / (self.y_end or 1) * (_HEIGHT - _TOP - _BOTTOM)

    def grid(self, *, y_labels: object) -> str:
        assert callable(y_labels)
        return "".join(
            f'<path class="grid" d="M{_LEFT} {self.y(value):.1f}H{_WIDTH - _RIGHT}"/>'
            f'<text class="tick" text-anchor="end" x="{_LEFT - 6}" y="{self.y(value) + 4:.1f}">{y_labels(value)}</text>'
            for value in _steps(self.y_end)
        )

    def x_ticks(self, unit: str) -> str:
        ticks = [(self.x(value), _HEIGHT - 24, "middle", _tick(value)) for value in _steps(self.x_end)]
        ticks.append((_WIDTH - _RIGHT, _HEIGHT - 6, "end", escape(unit)))
        return "".join(
            f'<text class="tick" text-anchor="{anchor}" x="{x:.1f}" y="{y}">{text}</text>'
            for x, y, anchor, text in ticks
        )

    def path(self, points: Iterable[tuple[float, float]], color: int, *, dodge: float = 0.0) -> str:
        places = "L".join(f"{self.x(x) + dodge:.1f} {self.y(y):.1f}" for x, y in points)
        return f'<path class="line s{color}" d="M{places}"/>' if places else ""


def _svg(width: int, height: int, parts: Iterable[str], *, title: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def _find_end(series: Sequence[Series]) -> float:
    """Of the axis: room for the intervals, unless they would make everything else small."""
    points = [point for one in series for point in one.points if point.value is not None]
    values = [point.value or 0.0 for point in points]
    tops = [value + (point.half_width or 0.0) for value, point in zip(values, points, strict=True)]
    return _nice_end(min(max(tops, default=1.0), 1.5 * max(values, default=1.0)))


def _nice_end(value: float) -> float:
    """The next 1, 1.5, 2, 2.5, 3, 4, 5, 6 or 8 times a power of ten."""
    if value <= 0 or not math.isfinite(value):
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next((step * power for step in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if step * power >= value), 10 * power)


def _steps(end: float) -> list[float]:
    return [end * step / 4 for step in range(5)]


def _tick(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:,.3g}"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _quantile(values: Sequence[float], share: float) -> float:
    return values[min(int(share * len(values)), len(values) - 1)]
