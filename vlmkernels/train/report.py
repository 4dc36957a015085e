"""A page that shows completions: prompt, images, texts, rewards, advantages. One HTML file that needs nothing else."""

import base64
import io
import math
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

THUMBNAIL = 192  # pixels, the longer side at most

STYLE = """
:root { color-scheme: light dark; --line: #8883; --soft: #8881; --good: 46 160 67; --bad: 218 54 51; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0; }
.summary { opacity: .75; margin: .2rem 0 1.5rem; }
section { border: 1px solid var(--line); border-radius: 10px; margin: 1rem 0; overflow: hidden; }
header { display: flex; gap: 1rem; align-items: flex-start; padding: .8rem 1rem; background: var(--soft); }
header img { border-radius: 6px; border: 1px solid var(--line); image-rendering: auto; background: #fff; }
header img.small { image-rendering: pixelated; }
pre { font: 13px/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
table { border-collapse: collapse; width: 100%; }
th, td { border-top: 1px solid var(--line); padding: .35rem .7rem; text-align: right; vertical-align: top; }
th { font-weight: 600; font-size: .85rem; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; width: 100%; }
td { font-variant-numeric: tabular-nums; }
"""


@dataclass(frozen=True)
class Row:
    """One completion on the page. ``rewards``: by the function's name, NaN = not scored."""

    prompt: str
    images: list[Image.Image]
    completion: str
    rewards: dict[str, float]
    advantage: float


def thumbnail(image: Image.Image) -> str:
    """An img element with the image, scaled down or (for tiny ones) up, inside the page."""
    scale = THUMBNAIL / max(image.size)
    size = tuple(max(1, round(side * min(scale, 4))) for side in image.size)
    small = image if scale >= 1 else image.resize(size, Image.Resampling.LANCZOS)
    data = io.BytesIO()
    small.convert("RGB").save(data, "PNG" if scale >= 1 else "JPEG", quality=85)
    kind = "png" if scale >= 1 else "jpeg"
    source = f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
    look = ' class="small"' if scale >= 1 else ""
    return f'<img{look} width="{size[0]}" height="{size[1]}" alt="" src="{source}">'


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _advantage(value: float) -> str:
    """A table cell, green above 0 and red below, the stronger the further."""
    tone, strength = ("--good" if value > 0 else "--bad"), min(abs(value) / 2, 1) * 0.6
    return f'<td style="background: rgb(var({tone}) / {strength:.2f})">{value:+.3f}</td>'


def _group(rows: list[Row]) -> str:
    """One prompt with its completions, the best first."""
    prompt, names = rows[0], list(rows[0].rewards)
    images = "".join(thumbnail(image) for image in prompt.images)
    head = "".join(f"<th>{escape(title)}</th>" for title in ("completion", *names, "advantage"))
    body = "".join(
        f"<tr><td><pre>{escape(row.completion)}</pre></td>"
        + "".join(f"<td>{_number(value)}</td>" for value in row.rewards.values())
        + f"{_advantage(row.advantage)}</tr>"
        for row in sorted(rows, key=lambda row: -row.advantage)
    )
    top = f"<header>{images}<pre>{escape(prompt.prompt)}</pre></header>"
    return f"<section>{top}<table><tr>{head}</tr>{body}</table></section>"


def write_report(path: str | Path, title: str, groups: list[list[Row]]) -> None:
    """Write the page: one section for each group of completions of one prompt."""
    rows = [row for group in groups for row in group]
    means = []
    for name in rows[0].rewards:
        scored = [row.rewards[name] for row in rows if not math.isnan(row.rewards[name])]
        means.append(f"{escape(name)} {sum(scored) / len(scored):.3f}" if scored else f"{escape(name)} –")
    summary = f"{len(groups)} prompts, {len(rows)} completions; mean rewards: {', '.join(means)}"
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
        f'<h1>{escape(title)}</h1><p class="summary">{summary}</p>{"".join(_group(group) for group in groups)}</html>'
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
