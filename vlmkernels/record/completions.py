"""Completions of a training step: prompts, images, texts, rewards, advantages; as JSON, and as a page of their own.

``completions/step-000012.json`` of a run:

    {"step": 12, "groups": [{"prompt": "...", "images": [[source, width, height, magnified], ...],
                             "completions": [{"text": "...", "rewards": {"iou": 0.5, "judge": null}, "advantage": 0.7}, ...]}]}

Images are thumbnails as data URIs, an advantage that is not finite is null. ``step-000012.html`` shows the same.
"""

import json
import math
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from vlmkernels.record.files import write_whole
from vlmkernels.record.html import Thumbnail, document, picture, thumbnail

MOST_STEPS = 100  # kept of a run; of more, every second one goes


@dataclass(frozen=True)
class Row:
    """One completion. ``rewards``: by the function's name, NaN = not scored."""

    prompt: str
    images: list[Image.Image]
    completion: str
    rewards: dict[str, float]
    advantage: float


def record(step: int, groups: list[list[Row]]) -> dict:
    """What is stored of groups of completions of one prompt each."""
    finite = lambda value: value if math.isfinite(value) else None  # noqa: E731
    return {
        "step": step,
        "groups": [
            {
                "prompt": rows[0].prompt,
                "images": [thumbnail(image) for image in rows[0].images],
                "completions": [
                    {
                        "text": row.completion,
                        "rewards": {name: finite(value) for name, value in row.rewards.items()},
                        "advantage": finite(row.advantage),
                    }
                    for row in rows
                ],
            }
            for rows in groups
        ],
    }


def stored(folder: Path) -> dict[int, Path]:
    """The files of a folder of completions by step, ascending."""
    found = {int(m[1]): path for path in folder.glob("step-*.json") if (m := re.fullmatch(r"step-(\d+)", path.stem))}
    return dict(sorted(found.items()))


def remove(path: Path) -> None:
    """A step's file and page."""
    path.unlink(missing_ok=True)
    path.with_suffix(".html").unlink(missing_ok=True)


def save(folder: Path, step: int, groups: list[list[Row]]) -> None:
    """Store a step and its page, and thin out the steps before it where they are many."""
    content = record(step, groups)
    path = folder / f"step-{step:06d}.json"
    write_whole(path, json.dumps(content))
    write_whole(path.with_suffix(".html"), document(f"Step {step}", f"<h1>Step {step}</h1>{step_html(content)}"))
    paths = list(stored(folder).values())
    if len(paths) > MOST_STEPS:
        for old in paths[1:-1:2]:
            remove(old)


def load(path: Path) -> dict:
    """What ``save`` stored.

    Raises:
        ValueError: it is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for group in content["groups"]:
            group["images"] = [Thumbnail(*image) for image in group["images"]]
            if not all(image.source.startswith("data:image/") for image in group["images"]):
                raise ValueError("an image is no data URI")
            [(row["text"], row["rewards"].items(), row["advantage"]) for row in group["completions"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name} must be completions as the trainer stores them, got {path} ({error!r})") from error
    return content


def _advantage(value: float | None) -> str:
    """A table cell, green above 0 and red below, the stronger the further."""
    if value is None:
        return "<td>–</td>"
    tone, strength = ("--good" if value > 0 else "--bad"), min(abs(value) / 2, 1) * 0.6
    return f'<td style="background: rgb(var({tone}) / {strength:.2f})">{value:+.3f}</td>'


def _group(group: dict) -> str:
    """One prompt with its completions, the best first, equal ones in one row."""
    rows: list[dict] = []
    counts: list[int] = []
    for row in sorted(group["completions"], key=lambda row: -(row["advantage"] or 0.0)):
        if row in rows:
            counts[rows.index(row)] += 1
        else:
            rows.append(row)
            counts.append(1)
    head = "".join(f"<th>{escape(title)}</th>" for title in ("completion", *rows[0]["rewards"], "advantage"))
    show = lambda value: "–" if value is None else f"{value:.3f}"  # noqa: E731
    body = "".join(
        f"<tr><td><pre>{escape(row['text'])}{f'<small> × {count}</small>' if count > 1 else ''}</pre></td>"
        + "".join(f"<td>{show(value)}</td>" for value in row["rewards"].values())
        + f"{_advantage(row['advantage'])}</tr>"
        for row, count in zip(rows, counts, strict=True)
    )
    images = "".join(map(picture, group["images"]))
    top = f"<header>{images}<pre>{escape(group['prompt'])}</pre></header>"
    return f"<section>{top}<table><tr>{head}</tr>{body}</table></section>"


def step_html(content: dict, most_groups: int | None = None) -> str:
    """The groups of a step (the first ones alone, where there is a limit) under a line on what they got."""
    rows = [row for group in content["groups"] for row in group["completions"]]
    if not rows:
        return '<p class="summary">no completions</p>'
    means = []
    for name in rows[0]["rewards"]:
        scored = [row["rewards"][name] for row in rows if row["rewards"][name] is not None]
        means.append(f"{escape(name)} {sum(scored) / len(scored):.3f}" if scored else f"{escape(name)} –")
    shown = content["groups"][:most_groups]
    of = f"{len(shown)} of " if len(shown) < len(content["groups"]) else ""
    summary = f"{of}{len(content['groups'])} prompts, {len(rows)} completions; mean rewards: {', '.join(means)}"
    return f'<p class="summary">{summary}</p>{"".join(map(_group, shown))}'
