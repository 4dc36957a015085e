"""Completions of a training step with their prompts, images, rewards and advantages, stored as JSON and as a page.

Schema of ``completions/step-000012.json``:

    {"step": 12, "groups": [{"prompt": "...", "images": [[source, width, height, magnified], ...],
                             "references": {"answer": "..."},
                             "completions": [{"text": "...", "rewards": {"iou": 0.5, "judge": null}, "advantage": 0.7}, ...]}]}

Images are thumbnails as data URIs. References are the columns of the dataset that the rewards need, as text. A reward or an
advantage that is not finite is null. ``step-000012.html`` shows the same.
"""

import json
import math
import re
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from PIL import Image

from vlmkernels.record.files import write_atomic
from vlmkernels.record.html import Thumbnail, document, picture, thumbnail

MAX_STEPS = 100  # kept of a run; when there are more, every second step is removed


@dataclass(frozen=True)
class CompletionRow:
    """One completion.

    Args:
        rewards: the value of each reward function by its name, NaN = not scored.
        references: what the rewards compare with, by column of the dataset.
    """

    prompt: str
    images: list[Image.Image]
    completion: str
    rewards: dict[str, float]
    advantage: float
    references: dict[str, str] = field(default_factory=dict)


Groups = list[list[CompletionRow]]  # groups of completions, each of one prompt


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _group_content(rows: list[CompletionRow]) -> dict:
    """Return the JSON object of the completions of one prompt."""
    return {
        "prompt": rows[0].prompt,
        "images": [thumbnail(image) for image in rows[0].images],
        "references": rows[0].references,
        "completions": [
            {
                "text": row.completion,
                "rewards": {name: _finite(value) for name, value in row.rewards.items()},
                "advantage": _finite(row.advantage),
            }
            for row in rows
        ],
    }


def stored_steps(folder: Path) -> dict[int, Path]:
    """Return the JSON files of a folder of completions by step, in ascending order."""
    found = {int(m[1]): path for path in folder.glob("step-*.json") if (m := re.fullmatch(r"step-(\d+)", path.stem))}
    return dict(sorted(found.items()))


def remove_step(path: Path) -> None:
    """Remove the JSON file of a step and its page."""
    path.unlink(missing_ok=True)
    path.with_suffix(".html").unlink(missing_ok=True)


def save_step(folder: Path, step: int, groups: Groups) -> None:
    """Write the JSON file of a step and its page. With more than ``MAX_STEPS`` steps, remove every second earlier one."""
    content = {"step": step, "groups": [_group_content(rows) for rows in groups]}
    path = folder / f"step-{step:06d}.json"
    write_atomic(path, json.dumps(content))
    write_atomic(path.with_suffix(".html"), document(f"Step {step}", f"<h1>Step {step}</h1>{step_html(content)}"))
    paths = list(stored_steps(folder).values())
    if len(paths) > MAX_STEPS:
        for old in paths[1:-1:2]:
            remove_step(old)


def load_step(path: Path) -> dict:
    """Read a file that ``save_step`` wrote.

    Raises:
        ValueError: the file has another schema.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for group in content["groups"]:
            group["images"] = [Thumbnail(*image) for image in group["images"]]
            if not all(image.source.startswith("data:image/") for image in group["images"]):
                raise ValueError("the source of an image is not a data URI")
            _ = group.setdefault("references", {}).items()  # absent in files of earlier versions
            for row in group["completions"]:
                _ = row["text"], row["rewards"].items(), row["advantage"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name} must hold completions that the trainer stored, got {path} ({error!r})") from error
    return content


def _reward_text(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _advantage_cell(value: float | None) -> str:
    """Return a table cell, green for a positive and red for a negative advantage."""
    if value is None:
        return "<td>–</td>"
    tone, strength = ("--good" if value > 0 else "--bad"), min(abs(value) / 2, 1) * 0.6
    return f'<td style="background: rgb(var({tone}) / {strength:.2f})">{value:+.3f}</td>'


def _group_html(group: dict) -> str:
    """Return the section of one prompt, with the best completion first and equal completions merged."""
    rows: list[dict] = []
    counts: list[int] = []
    for row in sorted(group["completions"], key=lambda row: -(row["advantage"] or 0.0)):
        if row in rows:
            counts[rows.index(row)] += 1
        else:
            rows.append(row)
            counts.append(1)
    head = "".join(f"<th>{escape(title)}</th>" for title in ("completion", *rows[0]["rewards"], "advantage"))
    body = "".join(
        f"<tr><td><pre>{escape(row['text'])}{f'<small> × {count}</small>' if count > 1 else ''}</pre></td>"
        + "".join(f"<td>{_reward_text(value)}</td>" for value in row["rewards"].values())
        + f"{_advantage_cell(row['advantage'])}</tr>"
        for row, count in zip(rows, counts, strict=True)
    )
    images = "".join(map(picture, group["images"]))
    known = "".join(f"<small>{escape(name)}: {escape(value)}</small>" for name, value in group["references"].items())
    top = f"<header>{images}<div><pre>{escape(group['prompt'])}</pre>{known}</div></header>"
    return f"<section>{top}<table><tr>{head}</tr>{body}</table></section>"


def step_html(content: dict, max_groups: int | None = None) -> str:
    """Return the HTML of a step: a line with the mean rewards, then at most ``max_groups`` groups.

    Args:
        content: the JSON object of a step.
    """
    rows = [row for group in content["groups"] for row in group["completions"]]
    if not rows:
        return '<p class="summary">no completions</p>'
    means = []
    for name in rows[0]["rewards"]:
        scored = [row["rewards"][name] for row in rows if row["rewards"][name] is not None]
        means.append(f"{escape(name)} {_reward_text(sum(scored) / len(scored) if scored else None)}")
    shown = content["groups"][:max_groups]
    part = f"{len(shown)} of " if len(shown) < len(content["groups"]) else ""
    summary = f"{part}{len(content['groups'])} prompts, {len(rows)} completions; mean rewards: {', '.join(means)}"
    return f'<p class="summary">{summary}</p>{"".join(map(_group_html, shown))}'
