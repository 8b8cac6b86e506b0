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
    log_y: bool = True, base: int = 10,
) -> str:  # fmt: skip
    """One `<svg>` that scales to its container, x logarithmic, y logarithmic (ticks at powers of `base`) or from 0."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    across = _scale(min(xs), max(xs), LEFT, WIDTH - RIGHT, True)
    low, high = (min(ys), max(ys)) if log_y else (0.0, max(ys) * 1.05 or 1.0)
    up = _scale(low * 0.8 if log_y else low, high * 1.25 if log_y else high, HEIGHT - BOTTOM, TOP + 18, log_y)
    parts = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" xmlns="http://www.w3.org/2000/svg" role="img" '
        f'font-family="system-ui, sans-serif" font-size="11" aria-label="{escape(title)}">',
        f'<text x="{LEFT}" y="16" font-size="13" font-weight="600" fill="currentColor">{escape(title)}</text>',
        *_axes(xs, _ticks(low, high, base if log_y else 0), across, up, x_label, y_text),
    ]
    for index, line in enumerate(lines):
        parts += _line(line, COLOURS[index % len(COLOURS)], across, up, y_text)
    parts += _legend(lines)
    return "\n".join([*parts, "</svg>"])


def beside(plots: Sequence[str]) -> str:
    """Plots next to each other in one `<svg>` of its own, dark on white."""
    placed = [
        plot.replace("<svg ", f'<svg x="{WIDTH * place}" width="{WIDTH}" height="{HEIGHT}" ', 1)
        for place, plot in enumerate(plots)
    ]
    style = 'style="color:#111;background:#fff"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {len(plots) * WIDTH} {HEIGHT}" {style}>'
    return "\n".join([head, *placed, "</svg>"])


def _axes(xs: Sequence[float], ticks: Sequence[float], across: Callable[[float], float], up: Callable[[float], float],
          x_label: str, y_text: Callable[[float], str]) -> list[str]:  # fmt: skip
    parts = []
    for value in ticks:
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


def _legend(lines: Sequence[Line], colours: Sequence[str] = COLOURS) -> list[str]:
    parts, x = [], float(LEFT)
    for index, line in enumerate(lines):
        colour = colours[index % len(colours)]
        parts.append(f'<rect x="{x:.0f}" y="23" width="12" height="4" rx="2" fill="{colour}"/>'
                     f'<text x="{x + 16:.0f}" y="29" fill="currentColor">{escape(line.name)}</text>')  # fmt: skip
        x += 30 + 6.2 * len(line.name)
    return parts


def _scale(low: float, high: float, start: float, stop: float, log: bool) -> Callable[[float], float]:
    def at(value: float) -> float:
        return math.log10(max(value, 1e-12)) if log else value

    span = at(high) - at(low) or 1.0
    return lambda value: start + (at(value) - at(low)) / span * (stop - start)


def _ticks(low: float, high: float, base: int) -> list[float]:
    """Powers of `base` within the range, few enough to read; quarters of it for base 0."""
    if not base:
        return [high * part / 4 for part in range(5)]
    first, last = math.floor(math.log(max(low, 1e-12), base)), math.ceil(math.log(max(high, 1e-12), base))
    powers = [float(base) ** power for power in range(first, last + 1) if low * 0.8 <= base**power <= high * 1.25]
    if base == 10 and len(powers) < 3:
        fine = [10.0**power * factor for power in range(first, last + 1) for factor in (1, 2, 5)]
        return [value for value in fine if low * 0.8 <= value <= high * 1.25]
    return powers[:: -(-len(powers) // 6)] if powers else [low, high]


def short(value: float) -> str:
    """512, 4k, 128k, 1M."""
    for size, letter in ((2**20, "M"), (2**10, "k")):
        if value >= size and value % size == 0:
            return f"{value / size:g}{letter}"
    for size, letter in ((10**6, "M"), (10**3, "k")):
        if value >= 10 * size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def bar_plot(
    title: str, bars: Sequence[tuple[str, float]], ghosts: dict[str, float], x_label: str,
    start: str = "before fitting", end: str = "fitted",
) -> str:  # fmt: skip
    """A bar from 0 for every (name, value), in front of a pale one for what it was before (`ghosts`)."""
    high = max([value for _, value in bars] + list(ghosts.values())) * 1.08 or 1.0
    room = (WIDTH - RIGHT - LEFT) / len(bars)
    base = HEIGHT - BOTTOM

    def y_of(value: float) -> float:
        return base - (base - TOP - 14) * value / high

    parts = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" xmlns="http://www.w3.org/2000/svg" role="img" '
        f'font-family="system-ui, sans-serif" font-size="11" aria-label="{escape(title)}">',
        f'<text x="{LEFT}" y="16" font-size="13" font-weight="600" fill="currentColor">{escape(title)}</text>',
        *_axes([], _ticks(0.0, high, 0), lambda x: x, y_of, x_label, lambda value: f"{value:.2g}"),
    ]
    every = max(1, len(bars) // 16)
    for index, (name, value) in enumerate(bars):
        x, width = LEFT + room * (index + 0.12), room * 0.76
        for size, opacity in ((ghosts.get(name), 0.25), (value, 1.0)):
            if size is not None:
                parts.append(f'<rect x="{x:.1f}" y="{y_of(size):.1f}" width="{width:.1f}" '
                             f'height="{base - y_of(size):.1f}" fill="{COLOURS[1]}" fill-opacity="{opacity}">'
                             f"<title>{escape(x_label)} {escape(name)}: {size:.4f}</title></rect>")  # fmt: skip
        if index % every == 0:
            parts.append(f'<text x="{x + width / 2:.1f}" y="{base + 16}" text-anchor="middle" fill="currentColor" '
                         f'fill-opacity=".7">{escape(name)}</text>')  # fmt: skip
    parts += _legend([Line(end, ()), *([Line(start, ())] if ghosts else [])], (COLOURS[1], COLOURS[1] + "40"))
    return "\n".join([*parts, "</svg>"])


@dataclass(frozen=True)
class Point:
    """A named place; both coordinates above 0."""

    name: str
    x: float
    y: float


def scatter_plot(
    line: Sequence[Point], points: Sequence[Point], title: str, x_label: str, y_label: str, colour: str, other: str,
) -> str:  # fmt: skip
    """A line with its points, and other points with their names written beside them; both axes logarithmic, x in
    percent."""
    wide, high = WIDTH * 1.6, HEIGHT * 1.5
    every = [*line, *points]
    xs, ys = [point.x for point in every], [point.y for point in every]
    across = _scale(min(xs) * 0.8, max(xs) * 1.3, LEFT, wide - RIGHT, True)
    up = _scale(min(ys) * 0.7, max(ys) * 1.5, high - BOTTOM, TOP + 18, True)
    parts = [
        f'<svg class="plot" viewBox="0 0 {wide:g} {high:g}" xmlns="http://www.w3.org/2000/svg" role="img" '
        f'font-family="system-ui, sans-serif" font-size="11" style="color:#111;background:#fff" '
        f'aria-label="{escape(title)}">',
        f'<text x="{LEFT}" y="16" font-size="13" font-weight="600" fill="currentColor">{escape(title)}</text>',
        f'<text x="{LEFT}" y="30" fill="currentColor" fill-opacity=".7">{escape(y_label)}</text>',
    ]
    for value in _ticks(min(ys), max(ys), 10):
        y = up(value)
        parts.append(f'<line x1="{LEFT}" x2="{wide - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" '
                     f'stroke-opacity=".13"/><text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" '
                     f'fill="currentColor" fill-opacity=".7">{value:g}</text>')  # fmt: skip
    for value in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
        if min(xs) * 0.8 <= value <= max(xs) * 1.3:
            parts.append(f'<text x="{across(value):.1f}" y="{high - BOTTOM + 16}" text-anchor="middle" '
                         f'fill="currentColor" fill-opacity=".7">{value:.0%}</text>')  # fmt: skip
    parts.append(f'<text x="{(LEFT + wide) / 2:.0f}" y="{high - 8}" text-anchor="middle" fill="currentColor" '
                 f'fill-opacity=".7">{escape(x_label)}</text>')  # fmt: skip
    path = " ".join(f"{across(point.x):.1f},{up(point.y):.1f}" for point in line)
    parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
    parts += [_dot(point, across, up, colour) for point in line]
    for point in points:
        parts += [_dot(point, across, up, other),
                  f'<text x="{across(point.x) + 6:.1f}" y="{up(point.y) + 4:.1f}" font-size="10" '
                  f'fill="currentColor">{escape(point.name)}</text>']  # fmt: skip
    return "\n".join([*parts, "</svg>"])


def _dot(point: Point, across: Callable[[float], float], up: Callable[[float], float], colour: str) -> str:
    told = f"{point.name}: {point.x:.1%}, {point.y:.3g}"
    return (f'<circle cx="{across(point.x):.1f}" cy="{up(point.y):.1f}" r="3.5" fill="{colour}">'
            f"<title>{escape(told)}</title></circle>")  # fmt: skip
