"""Draw curves, stacked areas and bars as SVG and HTML."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from vlmkernels.record.html import number, short

COLORS = (
    *("#3b82f6", "#e08a1e", "#475569", "#2ea043", "#c026d3", "#0ea5a5", "#b07a4f", "#dc4c4c"),
    *("#8b5cf6", "#eab308", "#db2777", "#84cc16", "#0369a1", "#7c2d12", "#94a3b8"),
)
GRAY, MARK = COLORS[-1], COLORS[6]
WIDTH, HEIGHT = 300, 120
MAX_POINTS = 300  # maximum number of points of a drawn curve
LABEL = 'font-size="10" fill="currentColor" opacity=".7"'
# Shows the step and the value under the mouse pointer in the caption.
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
    """A point of a curve, with an optional interval; NaN if there is none."""

    step: float
    value: float
    low: float = math.nan
    high: float = math.nan


def thin(points: Sequence[Point], max_points: int = MAX_POINTS) -> list[Point]:
    """Reduce a curve to at most ``max_points`` points: the means of neighbors, with their minimum and maximum as intervals."""
    if len(points) <= max_points:
        return list(points)
    size, result = -(-len(points) // max_points), []
    for start in range(0, len(points), size):
        neighbors = points[start : start + size]
        edges = [v for p in neighbors for v in (p.value, p.low, p.high) if not math.isnan(v)]
        mean = sum(point.value for point in neighbors) / len(neighbors)
        result.append(Point(neighbors[-1].step, mean, min(edges), max(edges)))
    return result


def running_mean(points: Sequence[Point], width: int = 15) -> list[float]:
    """Return the centered running mean over ``width`` points. The windows at the ends are shorter."""
    values = [point.value for point in points]
    windows = (values[max(0, i - width // 2) : i + width // 2 + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _frame(title: str, note: str, drawing: str, bounds: tuple[float, float], steps: tuple[float, float]) -> str:
    """Return a figure with axes around a drawing of WIDTH x HEIGHT.

    Args:
        note: tooltip of the title.
        drawing: the SVG inside the axes.
        bounds: values at the bottom and at the top.
        steps: the first and the last step.
    """
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


def curve(title: str, points: Sequence[Point], note: str = "", mark: float | None = None) -> str:
    """Draw a line over steps, with intervals as a band, and with the running mean if there are many points.

    Args:
        title: caption of the figure.
        points: in any order. Values that are not finite are left out.
        note: tooltip of the title.
        mark: a step to mark with a vertical line.

    Returns:
        HTML; an empty string if the curve is constant or covers fewer than 2 steps.
    """
    points = thin(sorted(point for point in points if math.isfinite(point.value)))
    if len({point.value for point in points}) < 2 or points[0].step == points[-1].step:
        return ""
    values = [v for p in points for v in (p.value, p.low, p.high) if not math.isnan(v)]
    bottom, top = min(values), max(values)
    first, last = points[0].step, points[-1].step

    def x(step: float) -> float:
        return WIDTH * (step - first) / (last - first)

    def y(value: float) -> float:
        return HEIGHT * (top - value) / (top - bottom)

    line = " ".join(f"{x(p.step):.2f},{y(p.value):.2f}" for p in points)
    noisy = len(points) > 40
    mean = " ".join(f"{x(p.step):.1f},{y(value):.1f}" for p, value in zip(points, running_mean(points), strict=True))
    smooth = f'<polyline points="{mean}" fill="none" stroke="{COLORS[0]}" stroke-width="2"/>'
    banded = [p for p in points if not math.isnan(p.low)]
    edge = [*((p.step, p.low) for p in banded), *((p.step, p.high) for p in reversed(banded))]
    band = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in edge)
    marks = "".join(f'<circle cx="{x(p.step):.1f}" cy="{y(p.value):.1f}" r="2.5" fill="{COLORS[0]}"/>' for p in points)
    marked = mark is not None and first <= mark <= last
    line_at = f'<path d="M{x(mark or 0):.1f} 0V{HEIGHT}" stroke="{MARK}" stroke-dasharray="4 3"/>' if marked else ""
    drawing = (
        f'{line_at}<polygon points="{band}" fill="{COLORS[0]}" opacity=".2"/>'
        f'<polyline class="line" points="{line}" fill="none" stroke="{COLORS[0]}" opacity="{0.3 if noisy else 1}"/>'
        f"{smooth if noisy else marks}"
    )
    return _frame(title, note, drawing, (bottom, top), (first, last))


def stack(title: str, steps: Sequence[float], parts: Mapping[str, Sequence[float]], colors: Sequence[str]) -> str:
    """Draw stacked areas over steps, the first part at the bottom.

    Args:
        title: caption of the figure.
        steps: in ascending order.
        parts: name of each part -> its values, >= 0, one per step.
        colors: one color per part, in order.

    Returns:
        HTML; an empty string for fewer than 2 steps.
    """
    if len(steps) < 2:
        return ""
    series = {name: thin([Point(*p) for p in zip(steps, values, strict=True)], 150) for name, values in parts.items()}
    drawn = [point.step for point in next(iter(series.values()))]
    top = max(sum(points[i].value for points in series.values()) for i in range(len(drawn))) or 1.0
    x = [WIDTH * (step - drawn[0]) / (drawn[-1] - drawn[0]) for step in drawn]
    below, drawing = [float(HEIGHT)] * len(drawn), ""
    for points, color in zip(series.values(), colors, strict=True):
        above = [y - HEIGHT * point.value / top for y, point in zip(below, points, strict=True)]
        outline = [*zip(x, above, strict=True), *reversed([*zip(x, below, strict=True)])]
        drawing += f'<polygon points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in outline)}" fill="{color}"/>'
        below = above
    return _frame(title, "", drawing, (0.0, top), (drawn[0], drawn[-1]))


def bars(rows: Sequence[tuple[str, float, str]], colors: Sequence[str] = COLORS[:1]) -> str:
    """Draw a table of bars.

    Args:
        rows: (name, value >= 0, text) of each bar. If the text is empty, the value is shown.
        colors: colors of the bars, repeated if there are more bars than colors.
    """
    maximum = max((value for _, value, _ in rows), default=0.0) or 1.0
    lines = "".join(
        f"<tr><td>{escape(name)}</td>"
        f'<td><i style="width: {100 * value / maximum:.1f}%; background: {colors[k % len(colors)]}"></i></td>'
        f"<td>{escape(text) or number(value)}</td></tr>"
        for k, (name, value, text) in enumerate(rows)
    )
    return f'<table class="bars">{lines}</table>'
