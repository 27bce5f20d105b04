"""A comparison as a picture: divergence against size, a point for each method, in SVG made by hand.

Knows rows and nothing of how they came about; no plotting library is needed.
"""

import math
from collections.abc import Sequence
from html import escape

from training.report import Number, Row

_WIDTH, _HEIGHT = 640, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 130, 30, 50
_COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2", "#9c6b4e")


def draw(rows: Sequence[Row]) -> str:
    """Size in MB to the right, KL to the float model upwards on a logarithmic scale, seeds as a vertical line."""
    shown = [row for row in rows if row.kl.mean > 1e-9]
    if not shown:
        shown = list(rows)
    across = _Scale(low=0, high=1.1 * max(row.bytes for row in shown) / 1e6, begin=_LEFT, end=_WIDTH - _RIGHT)
    upwards = _logarithmic([row.kl for row in shown])
    parts = [_frame(across, upwards)]
    for index, row in enumerate(shown):
        parts.append(_point(row, across, upwards, _COLORS[index % len(_COLORS)]))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'font-family="sans-serif" font-size="12">\n<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>\n'
        f"{body}\n</svg>\n"
    )


class _Scale:
    """Numbers from low to high, as positions from begin to end."""

    def __init__(self, *, low: float, high: float, begin: float, end: float) -> None:
        self.low, self.high, self.begin, self.end = low, high, begin, end

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.begin + share * (self.end - self.begin)


def _logarithmic(numbers: Sequence[Number]) -> _Scale:
    """Whole powers of ten about all numbers; positions of their logarithms."""
    low = math.floor(math.log10(max(1e-9, min(number.low for number in numbers))))
    high = math.ceil(math.log10(max(1e-9, max(number.high for number in numbers))))
    return _Scale(low=low, high=max(high, low + 1), begin=_HEIGHT - _BOTTOM, end=_TOP)


def _frame(across: _Scale, upwards: _Scale) -> str:
    parts = [
        f'<text x="{(across.begin + across.end) / 2}" y="{_HEIGHT - 12}" text-anchor="middle">weights, MB</text>',
        f'<text x="16" y="{_HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 16 {_HEIGHT / 2})">'
        "KL to the float model, nats a token</text>",
    ]
    for power in range(int(upwards.low), int(upwards.high) + 1):
        y = upwards(power)
        parts.append(f'<line x1="{across.begin}" x2="{across.end}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{across.begin - 6}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    for step in range(5):
        size = across.high * step / 4
        parts.append(f'<text x="{across(size):.1f}" y="{_HEIGHT - 32}" text-anchor="middle">{size:.3g}</text>')
    return "\n".join(parts)


def _point(row: Row, across: _Scale, upwards: _Scale, color: str) -> str:
    x = across(row.bytes / 1e6)
    low, middle, high = (upwards(math.log10(max(value, 1e-9))) for value in (row.kl.low, row.kl.mean, row.kl.high))
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{color}" stroke-width="2"/>'
        f'<circle cx="{x:.1f}" cy="{middle:.1f}" r="5" fill="{color}"/>'
        f'<text x="{x + 9:.1f}" y="{middle + 4:.1f}">{escape(row.method)}, {row.kl.mean:.3g}</text>'
    )
