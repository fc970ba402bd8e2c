"""Bar charts as SVG, of ratios on a logarithmic axis, with nothing but this file."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

_LEFT, _WIDTH, _ROW, _TOP = 330, 360, 18, 26


class Bar(NamedTuple):
    """A row of a chart."""

    label: str
    value: float
    spread: tuple[float, float]
    """First and third quartile."""
    predicted: float | None


def chart(bars: Sequence[Bar]) -> str:
    """Return a chart: a bar from 1 to each value, its quartiles as a line, and the
    prediction as a ring. All numbers are positive.
    """
    numbers = [1.0, *(each for bar in bars for each in (bar.value, bar.predicted) if each)]
    ticks = _ticks(min(numbers), max(numbers))
    low, high = ticks[0], ticks[-1]

    def place(value: float) -> float:
        share = math.log(min(max(value, low), high) / low) / math.log(high / low)
        return round(_LEFT + _WIDTH * share, 1)

    height = _TOP + _ROW * len(bars) + 4
    size = f'viewBox="0 0 {_LEFT + _WIDTH + 60} {height}"'
    style = 'font-size="11" fill="currentColor" stroke="currentColor" stroke-width="0"'
    parts = [f'<svg class="hvpd-chart" {size} role="img" {style}>']
    for tick in ticks:
        x = place(tick)
        parts.append(f'<text x="{x}" y="12" text-anchor="middle">{tick:g}</text>')
        parts.append(f'<line x1="{x}" x2="{x}" y1="{_TOP - 8}" y2="{height}" stroke-width="0.5" opacity="0.4"/>')
    one = place(1.0)
    for row, bar in enumerate(bars):
        top, x = _TOP + _ROW * row, place(bar.value)
        middle = top + 6
        start, end = (place(each) for each in bar.spread)
        parts += [
            f'<text x="{_LEFT - 8}" y="{top + 10}" text-anchor="end">{html.escape(bar.label)}</text>',
            f'<rect x="{min(one, x)}" y="{top}" width="{max(abs(x - one), 1):.1f}" height="12" opacity="0.45"/>',
            f'<line x1="{start}" x2="{end}" y1="{middle}" y2="{middle}" stroke-width="2"/>',
            f'<text x="{_LEFT + _WIDTH + 10}" y="{top + 10}">{bar.value:.3g}</text>',
        ]
        if bar.predicted:
            parts.append(f'<circle cx="{place(bar.predicted)}" cy="{middle}" r="4" fill="none" stroke-width="1.2"/>')
    return "".join([*parts, "</svg>"])


def _ticks(low: float, high: float) -> list[float]:
    """Return marks of the axis from one below all numbers to one above: at 1, 2 and 5
    times powers of ten, or at powers of ten alone if these are many.
    """
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if math.log10(high / low) < 2 else (1,)
    marks = [step * 10.0**power for power in powers for step in steps]
    first = max(index for index, mark in enumerate(marks) if mark <= low * 1.0001)
    last = min(index for index, mark in enumerate(marks) if mark >= high / 1.0001 and index > first)
    return marks[first : last + 1]
