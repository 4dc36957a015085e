"""Curves, areas and bars as SVG and HTML."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from vlmkernels.record.html import number, short

COLORS = (
    *("#3b82f6", "#e08a1e", "#2ea043", "#c026d3", "#0ea5a5", "#b07a4f", "#dc4c4c"),
    *("#8b5cf6", "#eab308", "#db2777", "#84cc16", "#0369a1", "#94a3b8"),
)
GREY = COLORS[-1]
WIDTH, HEIGHT = 300, 120
MOST_POINTS = 300  # of a curve that is drawn
LABEL = 'font-size="10" fill="currentColor" opacity=".7"'
# The step and the value under the pointer, in the caption.
SCRIPT = """
for (const figure of document.querySelectorAll('figure')) {
  const svg = figure.querySelector('svg'), line = figure.querySelector('.line'), caption = figure.querySelector('figcaption')
  if (!line) continue
  const [first, last, bottom, top] = svg.dataset.bounds.split(' ').map(Number), read = document.createElement('output')
  caption.append(read)
  svg.onpointermove = event => {
    const x = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x
    let near = line.points[0]
    for (const point of line.points) if (Math.abs(point.x - x) < Math.abs(near.x - x)) near = point
    const step = first + (last - first) * near.x / WIDTH, value = top - (top - bottom) * near.y / HEIGHT
    read.value = ` ${value.toPrecision(4)} at step ${Math.round(step)}`
  }
  svg.onpointerleave = () => read.value = ''
}
""".replace("WIDTH", str(WIDTH)).replace("HEIGHT", str(HEIGHT))


class Point(NamedTuple):
    """A value of a curve, with its interval where it has one."""

    step: float
    value: float
    low: float = math.nan
    high: float = math.nan


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most ``most`` points: means of neighbours, with the least and the greatest of them as interval."""
    if len(points) <= most:
        return list(points)
    size, result = -(-len(points) // most), []
    for start in range(0, len(points), size):
        some = points[start : start + size]
        values = [point.value for point in some]
        edges = [v for p in some for v in (p.value, p.low, p.high) if not math.isnan(v)]
        result.append(Point(some[-1].step, sum(values) / len(values), min(edges), max(edges)))
    return result


def running_mean(points: Sequence[Point], width: int = 15) -> list[float]:
    """Of each point and those around it, fewer at the ends."""
    values = [point.value for point in points]
    around = (values[max(0, i - width // 2) : i + width // 2 + 1] for i in range(len(values)))
    return [sum(some) / len(some) for some in around]


def _frame(title: str, note: str, drawing: str, bounds: tuple[float, float], steps: tuple[float, float]) -> str:
    """A figure around a drawing on 300 x 120: axes with their ends named."""
    (bottom, top), (first, last) = bounds, steps
    tip = f'<span title="{escape(note)}">{escape(title)}</span>' if note else escape(title)
    return (
        f'<figure><figcaption>{tip}</figcaption><svg viewBox="-44 -8 {WIDTH + 52} {HEIGHT + 26}"'
        f' data-bounds="{first:g} {last:g} {bottom:.6g} {top:.6g}">'
        f'<path d="M0 0V{HEIGHT}H{WIDTH}" fill="none" stroke="currentColor" opacity=".3"/>{drawing}'
        f'<text x="-4" y="4" text-anchor="end" {LABEL}>{short(top)}</text>'
        f'<text x="-4" y="{HEIGHT}" text-anchor="end" {LABEL}>{short(bottom)}</text>'
        f'<text x="0" y="{HEIGHT + 14}" {LABEL}>step {first:g}</text>'
        f'<text x="{WIDTH}" y="{HEIGHT + 14}" text-anchor="end" {LABEL}>{last:g}</text></svg></figure>'
    )


def curve(title: str, points: Sequence[Point], note: str = "") -> str:
    """A line over steps, its interval as a band, of many points their running mean too; nothing where it does not move.

    Args:
        note: shown where the pointer rests on the title.
    """
    points = thin(sorted(point for point in points if math.isfinite(point.value)))
    if len({point.value for point in points}) < 2 or points[0].step == points[-1].step:
        return ""
    values = [v for p in points for v in (p.value, p.low, p.high) if not math.isnan(v)]
    bottom, top = min(values), max(values)
    first, last = points[0].step, points[-1].step
    x = lambda step: WIDTH * (step - first) / (last - first)  # noqa: E731
    y = lambda value: HEIGHT * (top - value) / (top - bottom)  # noqa: E731
    line = " ".join(f"{x(p.step):.2f},{y(p.value):.2f}" for p in points)
    noisy = len(points) > 40
    mean = " ".join(f"{x(p.step):.1f},{y(value):.1f}" for p, value in zip(points, running_mean(points), strict=True))
    smooth = f'<polyline points="{mean}" fill="none" stroke="{COLORS[0]}" stroke-width="2"/>'
    banded = [p for p in points if not math.isnan(p.low)]
    edge = [*((p.step, p.low) for p in banded), *((p.step, p.high) for p in reversed(banded))]
    band = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in edge)
    marks = "".join(f'<circle cx="{x(p.step):.1f}" cy="{y(p.value):.1f}" r="2.5" fill="{COLORS[0]}"/>' for p in points)
    drawing = (
        f'<polygon points="{band}" fill="{COLORS[0]}" opacity=".2"/>'
        f'<polyline class="line" points="{line}" fill="none" stroke="{COLORS[0]}" opacity="{0.3 if noisy else 1}"/>'
        f"{smooth if noisy else marks}"
    )
    return _frame(title, note, drawing, (bottom, top), (first, last))


def stack(title: str, steps: Sequence[float], parts: dict[str, Sequence[float]], colors: Sequence[str]) -> str:
    """Areas over steps, one on another, the first at the bottom; nothing for fewer than 2 steps.

    Args:
        colors: of the parts, in order.
        parts: by name, a value >= 0 for each of the steps, ascending.
    """
    if len(steps) < 2:
        return ""
    series = {name: thin([Point(*p) for p in zip(steps, values, strict=True)], 150) for name, values in parts.items()}
    at = [point.step for point in next(iter(series.values()))]
    top = max(sum(points[i].value for points in series.values()) for i in range(len(at))) or 1.0
    x = [WIDTH * (step - at[0]) / (at[-1] - at[0]) for step in at]
    below, drawing = [float(HEIGHT)] * len(at), ""
    for points, color in zip(series.values(), colors, strict=True):
        above = [y - HEIGHT * point.value / top for y, point in zip(below, points, strict=True)]
        outline = [*zip(x, above, strict=True), *reversed([*zip(x, below, strict=True)])]
        drawing += f'<polygon points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in outline)}" fill="{color}"/>'
        below = above
    return _frame(title, "", drawing, (0.0, top), (at[0], at[-1]))


def bars(rows: Sequence[tuple[str, float, str]], colors: Sequence[str] = COLORS[:1]) -> str:
    """A table of (name, value >= 0, text), with a bar for each value; colours in turn."""
    most = max((value for _, value, _ in rows), default=0.0) or 1.0
    lines = "".join(
        f"<tr><td>{escape(name)}</td>"
        f'<td><i style="width: {100 * value / most:.1f}%; background: {colors[k % len(colors)]}"></i></td>'
        f"<td>{escape(text) or number(value)}</td></tr>"
        for k, (name, value, text) in enumerate(rows)
    )
    return f'<table class="bars">{lines}</table>'
