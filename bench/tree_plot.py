"""Draws docs/tree-cost.svg, the cost of trees against depth and branching, from bench/results/tree-cost-<device>.json.

    python bench/tree_plot.py            # writes the file
    python bench/tree_plot.py --check    # fails if the file is out of date

plot.py says why the SVG is written by hand.
"""

import json
import math
import sys

from harness import RESULTS
from plot import TEXT, text

PLOT = RESULTS.parents[1] / "docs" / "tree-cost.svg"
MEASURED = RESULTS / "tree-cost-amd-epyc-2-cores.json"
COLORS = {2: "#2f81f7", 4: "#bc4c00", 8: "#2da44e"}
PANELS = {"attention": "attention", "model": "whole model, with its head"}
WIDTH, HEIGHT, LEFT, RIGHT, GAP, TOP, BOTTOM = 860, 400, 40, 12, 50, 84, 350


def panel(rows: list[dict], x: float, width: float, heading: str, largest: int, deepest: int) -> list[str]:
    """Times of copies relative to those of a pack, and dashed the same of the numbers of tokens."""

    def place(depth: float, ratio: float) -> tuple[float, float]:
        return x + (depth - 1) / (deepest - 1) * width, BOTTOM - ratio / largest * (BOTTOM - TOP)

    lines = [text(x, TOP - 14, heading, weight="bold")]
    for ratio in range(largest + 1):
        _, y = place(1, ratio)
        opacity = 1 if ratio == 0 else 0.25
        lines.append(f'<path d="M{x:.1f} {y:.1f}h{width:.1f}" stroke="{TEXT}" stroke-opacity="{opacity}" fill="none"/>')
        if ratio % 2 == 0:
            lines.append(text(x - 8, y + 4, str(ratio), anchor="end"))
    for depth in sorted({row["depth"] for row in rows}):
        lines.append(text(place(depth, 0)[0], BOTTOM + 18, str(depth), anchor="middle"))
    for branching, color in COLORS.items():
        own = sorted((row for row in rows if row["branching"] == branching), key=lambda row: row["depth"])
        for numerator, denominator, dash in (("copied_tokens", "tokens", ' stroke-dasharray="3 4"'), ("copies_ms", "ms", "")):
            points = [place(row["depth"], row[numerator] / row[denominator]) for row in own]
            path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
            lines.append(f'<path d="{path}" stroke="{color}" stroke-width="{1 if dash else 2}"{dash} fill="none"/>')
        lines += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{color}"/>' for a, b in points]
    return lines


def svg() -> str:
    content = json.loads(MEASURED.read_text())
    rows = content["rows"]
    largest = math.ceil(max(max(row["copies_ms"] / row["ms"], row["copied_tokens"] / row["tokens"]) for row in rows))
    deepest, width = max(row["depth"] for row in rows), (WIDTH - LEFT - RIGHT - GAP) / 2
    title = f"Copies of every path: how many times as long as one pack of the tree ({content['device']})"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img"'
        ' font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
        f"<title>{title}</title>",
        text(0, 20, title, size=14, weight="bold"),
    ]
    x = LEFT
    for branching, color in COLORS.items():
        lines.append(f'<path d="M{x} 40h24" stroke="{color}" stroke-width="2" fill="none"/>')
        lines.append(text(x + 30, 44, f"{branching} segments per level"))
        x += 190
    lines.append(f'<path d="M{x} 40h24" stroke="{TEXT}" stroke-dasharray="3 4" fill="none"/>')
    lines.append(text(x + 30, 44, "the same ratio of tokens"))
    for number, (what, heading) in enumerate(PANELS.items()):
        chosen = [row for row in rows if row["what"] == what]
        left = LEFT + number * (width + GAP)
        lines += panel(chosen, left, width, heading, largest, deepest)
        lines.append(text(left + width / 2, BOTTOM + 38, "depth of the tree", anchor="middle"))
    return "\n".join([*lines, "</svg>", ""])


def main() -> int:
    if "--check" in sys.argv:
        return int(PLOT.read_text() != svg())
    PLOT.write_text(svg())
    return 0


if __name__ == "__main__":
    sys.exit(main())
