"""Line plots as SVG text: no library, readable in light and dark, the values themselves in tooltips."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#7a7f87", "#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626")
WIDTH, HEIGHT = 460, 270
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 34, 44


@dataclass(frozen=True)
class Line:
    """A named series of (x, y), x ascending and above 0."""

    name: str
    points: Sequence[tuple[float, float]]


def line_plot(
    lines: Sequence[Line], title: str, x_label: str, y_text: Callable[[float], str] = lambda value: f"{value:g}",
    log_y: bool = True,
) -> str:  # fmt: skip
    """One `<svg>` that scales to its container, x logarithmic, y logarithmic or from 0."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    across = _scale(min(xs), max(xs), LEFT, WIDTH - RIGHT, True)
    low, high = (min(ys), max(ys)) if log_y else (0.0, max(ys) * 1.05 or 1.0)
    up = _scale(low * 0.8 if log_y else low, high * 1.25 if log_y else high, HEIGHT - BOTTOM, TOP + 18, log_y)
    parts = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" xmlns="http://www.w3.org/2000/svg" role="img" '
        f'font-family="system-ui, sans-serif" font-size="11" aria-label="{escape(title)}">',
        f'<text x="{LEFT}" y="16" font-size="13" font-weight="600" fill="currentColor">{escape(title)}</text>',
        *_axes(xs, ys, across, up, x_label, y_text, log_y, low, high),
    ]
    for index, line in enumerate(lines):
        parts += _line(line, COLOURS[index % len(COLOURS)], across, up, y_text)
    parts += _legend(lines)
    return "\n".join([*parts, "</svg>"])


def _axes(xs: Sequence[float], ys: Sequence[float], across: Callable[[float], float], up: Callable[[float], float],
          x_label: str, y_text: Callable[[float], str], log_y: bool, low: float, high: float) -> list[str]:  # fmt: skip
    parts = []
    for value in _ticks(low, high, log_y):
        y = up(value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" '
                     f'stroke-opacity=".13"/><text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" '
                     f'fill="currentColor" fill-opacity=".7">{escape(y_text(value))}</text>')  # fmt: skip
    for value in sorted(set(xs)):
        parts.append(f'<text x="{across(value):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle" '
                     f'fill="currentColor" fill-opacity=".7">{short(value)}</text>')  # fmt: skip
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle" fill="currentColor" '
                 f'fill-opacity=".7">{escape(x_label)}</text>')  # fmt: skip
    return parts


def _line(line: Line, colour: str, across: Callable[[float], float], up: Callable[[float], float],
          y_text: Callable[[float], str]) -> list[str]:  # fmt: skip
    path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line.points)
    dots = [
        f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3.5" fill="{colour}">'
        f"<title>{escape(line.name)}, {short(x)}: {escape(y_text(y))}</title></circle>"
        for x, y in line.points
    ]
    return [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>', *dots]


def _legend(lines: Sequence[Line]) -> list[str]:
    parts, x = [], float(LEFT)
    for index, line in enumerate(lines):
        colour = COLOURS[index % len(COLOURS)]
        parts.append(f'<rect x="{x:.0f}" y="23" width="12" height="4" rx="2" fill="{colour}"/>'
                     f'<text x="{x + 16:.0f}" y="29" fill="currentColor">{escape(line.name)}</text>')  # fmt: skip
        x += 30 + 6.2 * len(line.name)
    return parts


def _scale(low: float, high: float, start: float, stop: float, log: bool) -> Callable[[float], float]:
    def at(value: float) -> float:
        return math.log10(max(value, 1e-12)) if log else value

    span = at(high) - at(low) or 1.0
    return lambda value: start + (at(value) - at(low)) / span * (stop - start)


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if not log:
        return [high * part / 4 for part in range(5)]
    first, last = math.floor(math.log10(max(low, 1e-12))), math.ceil(math.log10(max(high, 1e-12)))
    decades = [10.0**power for power in range(first, last + 1)]
    fine = [decade * factor for decade in decades for factor in (1, 2, 5)]
    inside = [value for value in fine if low * 0.8 <= value <= high * 1.25]
    coarse = [value for value in decades if low * 0.8 <= value <= high * 1.25]
    return (coarse if len(coarse) >= 3 else inside)[:8]


def short(value: float) -> str:
    """512, 4k, 128k, 1M."""
    for size, letter in ((2**20, "M"), (2**10, "k")):
        if value >= size and value % size == 0:
            return f"{value / size:g}{letter}"
    for size, letter in ((10**6, "M"), (10**3, "k")):
        if value >= 10 * size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
