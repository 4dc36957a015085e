"""Completions of a training step with their prompts, images, rewards and advantages, stored as JSON and as a page.

Schema of ``completions/step-000012.json``:

    {"step": 12, "groups": [{"prompt": "...", "images": [[source, width, height, magnified], ...],
                             "references": {"answer": "..."},
                             "completions": [{"text": "...", "rewards": {"iou": 0.5, "judge": null}, "advantage": 0.7}, ...]}]}

Images are thumbnails as data URIs. References are the columns of the dataset that the rewards need, as text. A reward or an
advantage that is not finite is null. ``step-000012.html`` shows the same.

A completion of several turns is a trajectory, which has the results of tools between the turns of the model. Its "text" is that
of the last turn of the model, and it also has "turns"; their schema is in ``vlmkernels.record.turns``. The group has
"tool_images": [[source, width, height, magnified], ...], the images of its results, each stored once.
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
from vlmkernels.record.turns import LEGEND, Shots, TurnRow, count, from_json, to_json, transcript, turns_html

MAX_STEPS = 100  # kept of a run; when there are more, every second step is removed


@dataclass(frozen=True)
class CompletionRow:
    """One completion.

    Args:
        completion: the text; for a trajectory, that of the last turn of the model.
        rewards: the value of each reward function by its name, NaN = not scored.
        references: what the rewards compare with, by column of the dataset.
        turns: the turns of a trajectory; empty for other completions.
    """

    prompt: str
    images: list[Image.Image]
    completion: str
    rewards: dict[str, float]
    advantage: float
    references: dict[str, str] = field(default_factory=dict)
    turns: list[TurnRow] = field(default_factory=list)

    @property
    def full_text(self) -> str:
        """The completion, or all turns of a trajectory."""
        return transcript(self.turns) if self.turns else self.completion


Groups = list[list[CompletionRow]]  # groups of completions, each of one prompt


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def group_content(rows: list[CompletionRow]) -> dict:
    """Return the JSON object of a group, the completions of one prompt."""
    places: dict[Thumbnail, int] = {}
    turns = [to_json(_own_prompt(row, rows[0]) + row.turns, places) for row in rows]
    return {
        "prompt": rows[0].prompt,
        "images": [thumbnail(image) for image in rows[0].images],
        "references": rows[0].references,
        "completions": [
            {
                "text": row.completion,
                "rewards": {name: _finite(value) for name, value in row.rewards.items()},
                "advantage": _finite(row.advantage),
                **({"turns": own} if own else {}),
            }
            for row, own in zip(rows, turns, strict=True)
        ],
        **({"tool_images": list(places)} if places else {}),
    }


def _own_prompt(row: CompletionRow, first: CompletionRow) -> list[TurnRow]:
    """Return the prompt of a trajectory if its group does not share it, because environments began differently."""
    if not row.turns or (row.prompt, row.images) == (first.prompt, first.images):
        return []
    return [TurnRow("user", row.prompt, images=[thumbnail(image) for image in row.images])]


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
    content = {"step": step, "groups": [group_content(rows) for rows in groups]}
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
            for name in {"images", "tool_images"} & group.keys():
                group[name] = [Thumbnail.from_json(image) for image in group[name]]
            _ = group.setdefault("references", {}).items()  # absent in files of earlier versions
            for row in group["completions"]:
                _ = row["text"], row["rewards"].items(), row["advantage"], from_json(*_stored_turns(row, group))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name} must hold completions that the trainer stored, got {path} ({error!r})") from error
    return content


def _stored_turns(row: dict, group: dict) -> tuple[list[dict], list[Thumbnail]]:
    """Return the JSON objects of a completion's turns, and the images of its group that they name."""
    return row.get("turns", []), group.get("tool_images", [])


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
    shots = Shots()
    body = "".join(_row_html(row, times, group, shots) for row, times in zip(rows, counts, strict=True))
    images = "".join(map(picture, group["images"]))
    known = "".join(f"<small>{escape(name)}: {escape(value)}</small>" for name, value in group["references"].items())
    top = f"<header>{images}<div><pre>{escape(group['prompt'])}</pre>{known}</div></header>"
    return f"<section{shots.style()}>{top}<table><tr>{head}</tr>{body}</table></section>"


def _row_html(row: dict, times: int, group: dict, shots: Shots) -> str:
    """Return the row of a completion that occurs ``times`` times; a trajectory has a second row across the table."""
    turns = from_json(*_stored_turns(row, group))
    repeated = f"<small> × {times}</small>" if times > 1 else ""
    cells = "".join(f"<td>{_reward_text(value)}</td>" for value in row["rewards"].values()) + _advantage_cell(row["advantage"])
    if not turns:
        return f"<tr><td><pre>{escape(row['text'])}{repeated}</pre></td>{cells}</tr>"
    notes = [str(count(turns)), *([] if any(turn.trained for turn in turns) else ["not trained on"])]
    whole = f'<tr class="whole"><td colspan="{2 + len(row["rewards"])}">{turns_html(turns, shots)}</td></tr>'
    return f"<tr><td><small>{' · '.join(notes)}</small>{repeated}</td>{cells}</tr>{whole}"


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
    legend = LEGEND if any(row.get("turns") for row in rows) else ""
    return f'<p class="summary">{summary}{legend}</p>{"".join(map(_group_html, shown))}'
