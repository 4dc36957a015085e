"""Draws docs/training-step.svg, the plot of the README, from bench/results/nvidia-h200.json.

    python bench/plot.py            # writes the file
    python bench/plot.py --check    # fails if the file is out of date

The SVG is written by hand: it needs no plotting library, a test compares it byte for byte, and its colors are readable on a
light and on a dark background.
"""

import json
import sys

from harness import RESULTS

PLOT = RESULTS.parents[1] / "docs" / "training-step.svg"
CASES = {
    "training step 0.5b, 1 x 8 completions of 256 tokens, an image of 1225": "0.7 B parameters",
    "training step 3b, 1 x 8 completions of 256 tokens, an image of 1225": "3.8 B parameters",
}
PROVIDERS = {"vlmkernels": "#2f81f7", "TRL GRPOTrainer": "#bc4c00"}
TEXT = "#768390"  # contrast of about 4 to 1 with white and with GitHub's dark background
WIDTH, LEFT, GAP, BAR, ROW = 860, 190, 60, 18, 24
PANELS = (("milliseconds per step", "ms", 1.0), ("peak GiB above weights and optimizer", "peak_mib", 2**-10))


def measured() -> dict[str, dict[str, dict]]:
    """The rows of each case by provider; a provider that ran out of memory has no "ms"."""
    cases = json.loads((RESULTS / "nvidia-h200.json").read_text())["cases"]
    rows = {title: {row["provider"]: row for row in cases[case]["rows"]} for case, title in CASES.items()}
    return {title: {name: by_name[name] for name in PROVIDERS} for title, by_name in rows.items()}


def text(x: float, y: float, content: str, *, anchor: str = "start", size: int = 13, weight: str = "normal") -> str:
    style = f'font-size="{size}" text-anchor="{anchor}" font-weight="{weight}" fill="{TEXT}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{content}</text>'


def panel(groups: dict[str, dict[str, dict]], x: float, width: float, heading: str, key: str, scale: float) -> list[str]:
    """One bar for each case and provider, with its value."""
    largest = max(row[key] * scale for rows in groups.values() for row in rows.values() if key in row)
    lines, y = [text(x, 58, heading, weight="bold")], 74
    for rows in groups.values():
        for provider, row in rows.items():
            if key in row:
                value = row[key] * scale
                length = value / largest * (width - 60)
                lines.append(f'<rect x="{x}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{PROVIDERS[provider]}"/>')
                lines.append(text(x + length + 6, y + 14, f"{value:.0f}" if key == "ms" else f"{value:.1f}"))
            else:
                lines.append(text(x, y + 14, "out of memory (140 GiB)"))
            y += ROW
        y += ROW / 2
    return lines


def svg() -> str:
    groups = measured()
    height = 74 + len(groups) * (2 * ROW + ROW // 2)
    width = (WIDTH - LEFT - GAP) / 2
    title = "GRPO training step on one NVIDIA H200, sampling excluded: one image, 8 completions"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img"'
        ' font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
        f"<title>{title}</title>",
        text(0, 20, title, size=14, weight="bold"),
    ]
    y = 74
    for group, rows in groups.items():
        lines.append(text(0, y + BAR / 2 + ROW / 2 + 4, group.replace(" parameters", ""), weight="bold"))
        for provider in rows:
            lines.append(text(LEFT - 10, y + 14, provider, anchor="end"))
            y += ROW
        y += ROW // 2
    for number, (heading, key, scale) in enumerate(PANELS):
        lines += panel(groups, LEFT + number * (width + GAP), width, heading, key, scale)
    return "\n".join([*lines, "</svg>", ""])


def main() -> int:
    if "--check" in sys.argv:
        return int(PLOT.read_text() != svg())
    PLOT.write_text(svg())
    return 0


if __name__ == "__main__":
    sys.exit(main())
