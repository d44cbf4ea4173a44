"""Charts of report.html as inline SVG: lines over steps, and a field of cells. Colours are the page's.

A point's ``y`` that is None is left out; numbers that are not finite too.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float | None]]

WIDTH, HEIGHT = 520, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 30
MOST_POINTS = 400
CELLS_WIDTH = 1040
LEVELS = 10


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        label: for the legend; "" for none.
        points: (x, y).
        colour: number of one of the page's colours.
        dots: mark the points.
    """

    label: str
    points: Points
    colour: int = 0
    dots: bool = False


def number(value: float) -> str:
    """A number as an axis has it."""
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e6):
        return f"{value:.2g}"
    return f"{value:,.4g}" if size < 1000 else f"{value:,.0f}"


def line_chart(title: str, lines: Sequence[Line], form: Callable[[float], str] = number) -> str:
    """A chart with axes from the data; "" where no line has a point.

    Args:
        title: above it.
        lines: what is drawn.
        form: how a value is written.
    """
    kept = [(line, _sound(line.points)) for line in lines]
    kept = [(line, points) for line, points in kept if points]
    if not kept:
        return ""
    xs = [x for _, points in kept for x, _ in points]
    ys = [y for _, points in kept for _, y in points]
    ticks = _ticks(min(ys), max(ys))
    low, high = min(ticks[0], min(ys)), max(ticks[-1], max(ys))
    first, last = min(xs), max(xs)

    def at(x: float, y: float) -> tuple[float, float]:
        across = 0.5 if last == first else (x - first) / (last - first)
        up = 0.5 if high == low else (y - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in ticks:
        _, y = at(first, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{form(tick)}</text>'
        )
    steps = [first] if first == last else _ticks(first, last, 5)
    for tick in (t for t in steps if first <= t <= last and t == round(t)):  # (there is no half a step)
        x, _ = at(tick, low)
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{number(tick)}</text>'
        )
    for line, points in kept:
        shown = [at(x, y) for x, y in _thinned(points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in shown)
        if len(shown) > 1:
            parts.append(f'<polyline class="line c{line.colour}" points="{path}"/>')
        if line.dots or len(shown) == 1:
            for (x, y), (step, value) in zip(shown, _thinned(points), strict=True):
                told = html.escape(f"{line.label or title}, step {number(step)}: {form(value)}")
                parts.append(
                    f'<circle class="dot c{line.colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
                    f"<title>{told}</title></circle>"
                )
    legend = "".join(
        f'<span><i class="key c{line.colour}"></i>{html.escape(line.label)}</span>'
        for line, _ in kept
        if line.label
    )
    name = html.escape(title)
    return (
        f'<figure><figcaption>{name}<span class="legend">{legend}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{"".join(parts)}</svg></figure>'
    )


def cells(rows: Sequence[tuple[str, Sequence[int]]]) -> str:
    """A field of cells, a row for each name; its colour says how a count compares with its row's mean.

    The middle colour is the mean, the darkest four times as much or more.
    """
    most = max((len(counts) for _, counts in rows), default=0)
    if not most:
        return ""
    height = 13.0
    left = 9 + 6.2 * max(len(name) for name, _ in rows)
    width = (CELLS_WIDTH - left) / most
    wide = max(0.5, width - 0.6)
    paths: list[list[str]] = [[] for _ in range(LEVELS)]
    labels = []
    for index, (name, counts) in enumerate(rows):
        y = index * height
        mean = sum(counts) / len(counts) if counts else 0
        labels.append(f'<text class="tick" x="{left - 6:.0f}" y="{y + 10:.0f}" text-anchor="end">')
        labels.append(f"{html.escape(name)}</text>")
        for expert, count in enumerate(counts):
            x = left + expert * width
            level = heat(count, mean)
            paths[level].append(f"M{x:.1f} {y:.1f}h{wide:.1f}v{height - 1:.1f}h-{wide:.1f}z")
    drawn = "".join(f'<path class="h{i}" d="{"".join(path)}"/>' for i, path in enumerate(paths) if path)
    size = f"0 0 {CELLS_WIDTH} {len(rows) * height:.0f}"
    return f'<svg class="cells" viewBox="{size}" role="img">{"".join(labels)}{drawn}</svg>'


def heat(count: float, mean: float) -> int:
    """Level of a cell: 0 for none, then by the logarithm of its share, from an eighth of the mean to four
    times as much.
    """
    if not count or not mean:
        return 0
    position = (math.log2(count / mean) + 3) / 5  # 1/8 -> 0, 4 -> 1
    return 1 + min(LEVELS - 2, max(0, round(position * (LEVELS - 2))))


def _sound(points: Points) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if y is not None and math.isfinite(y)]


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """At most `MOST_POINTS` of them: of each run the mean, so that nothing is left out."""
    if len(points) <= MOST_POINTS:
        return points
    step = math.ceil(len(points) / MOST_POINTS)
    runs = [points[i : i + step] for i in range(0, len(points), step)]
    return [(run[-1][0], sum(y for _, y in run) / len(run)) for run in runs]


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers around the range."""
    if low == high:
        return [low]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * f for f in (1, 2, 2.5, 5, 10) if power * f >= rough * 0.999)
    start = math.floor(low / step + 1e-9)
    ticks = []
    while True:
        ticks.append(start * step)
        if ticks[-1] >= high - step * 1e-9:
            return ticks
        start += 1
