"""The results of ``vlmkernels demo --tools`` on the held-out pages, and the HTML page that shows them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmkernels.demo.zoom_task import COLUMNS, FIND, ROWS, SEEN
from vlmkernels.evaluate.predictions import Completion
from vlmkernels.evaluate.statistics import Estimate, estimate, mean_of
from vlmkernels.record.files import write_atomic
from vlmkernels.record.html import document, picture, thumbnail
from vlmkernels.record.turns import Shots, turns_html
from vlmkernels.report.curves import SCRIPT, curve
from vlmkernels.report.run import curves_of

NUM_SHOWN = 12  # trajectories
CURVES = {
    "rewards/exact_match/mean": "share of right answers, sampled",
    "tools/call_frequency": "calls of the tool per answer",
    "rewards/right_note/mean": "share of calls for the note with the red frame",
}
STYLE = """
td + td { white-space: nowrap; }
.card { border: 1px solid var(--line); border-radius: 10px; margin: 1rem 0; padding: .8rem 1rem; }
.images { display: flex; flex-wrap: wrap; gap: 1rem; } .images small { display: block; opacity: .75; }
.two { display: grid; gap: .5rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
.two { margin-top: .8rem; } .two > div > b { display: block; margin-bottom: .3rem; }
.right { color: rgb(var(--good)); } .wrong { color: rgb(var(--bad)); }
"""


@dataclass(frozen=True)
class Outcome:
    """Greedy answers of a model to the held-out pages.

    Args:
        name: how the model was trained.
        has_tool: whether it could call the tool.
        completions: one per page.
        pages: the pages.
    """

    name: str
    has_tool: bool
    completions: Sequence[Completion]
    pages: Sequence[Mapping[str, Any]]

    @cached_property
    def correct(self) -> np.ndarray:
        """Whether each answer is right, (N,) bool."""
        return np.array([c.text.strip() == page["answer"] for c, page in zip(self.completions, self.pages, strict=True)])

    @property
    def accuracy(self) -> Estimate:
        """The share of right answers, with its 95 % confidence interval."""
        return estimate(mean_of(self.correct[:, None].astype(float)))

    @property
    def calls(self) -> float:
        """Calls of the tool per answer."""
        return float(np.mean([c.tool_calls or 0 for c in self.completions]))

    @property
    def right_calls(self) -> float | None:
        """The share of calls that are for the note with the red frame; None without calls."""
        scores = [c.rewards["right_note"] for c in self.completions if c.rewards]
        scored = [score for score in scores if score is not None]
        return float(np.mean(scored)) if scored else None

    def to_json(self) -> dict[str, Any]:
        """Return the numbers for metrics.json."""
        accuracy = dict(zip(("value", "low", "high"), map(float, self.accuracy[:3]), strict=True))
        return {"name": self.name, "tool": self.has_tool, "accuracy": accuracy, "calls": self.calls, "right": self.right_calls}


def _table(outcomes: Sequence[Outcome]) -> str:
    """Return the table of accuracies."""
    rows = []
    for outcome in outcomes:
        value, low, high, _ = outcome.accuracy
        name = f"{'with' if outcome.has_tool else 'without'} the tool, {escape(outcome.name)}"
        right = "–" if outcome.right_calls is None else f"{outcome.right_calls:.0%}"
        rows.append(
            f"<tr><td>{name}</td><td><b>{value:.1%}</b></td>"
            f"<td>{low:.1%} – {high:.1%}</td><td>{outcome.calls:.2f}</td><td>{right}</td></tr>"
        )
    names = ("", "right answers", "95 % interval", "calls per answer", "of the right note")
    return f"<section><table><tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>{''.join(rows)}</table></section>"


def _trajectory(name: str, outcome: Outcome, place: int, shots: Shots) -> str:
    """Return the turns of an answer to the page ``place``."""
    tone = "right" if outcome.correct[place] else "wrong"
    turns = turns_html(outcome.completions[place].turns or [], shots)
    return f'<div><b class="{tone}">{name}: {tone}</b>{turns}</div>'


def _card(place: int, before: Outcome, after: Outcome) -> str:
    """Return a page, what the model sees of it, and the answers before and after GRPO."""
    page = before.pages[place]
    whole = page["image"].convert("RGB")
    seen = thumbnail(whole.resize(SEEN, Image.Resampling.BICUBIC))
    shots = Shots()
    trajectories = _trajectory("before GRPO", before, place, shots) + _trajectory("after", after, place, shots)
    truth = f"row {page['row']}, column {page['column']}: {page['answer']}"
    return (
        f'<div class="card"{shots.style()}><div class="images">'
        f"<div><small>the page, {whole.width} x {whole.height} pixels</small>{picture(thumbnail(whole))}</div>"
        f"<div><small>what the model sees, {SEEN[0]} x {SEEN[1]}</small>{picture(seen)}</div>"
        f'<div><small>in the red frame</small>{escape(truth)}</div></div><div class="two">{trajectories}</div></div>'
    )


def write_page(path: Path, subtitle: str, outcomes: Sequence[Outcome], log: list[dict[str, Any]]) -> None:
    """Write a self-contained HTML page: accuracies, curves, and whole trajectories before and after GRPO.

    Args:
        path: file to write.
        subtitle: how the results were made.
        outcomes: the results. The last two are those with the tool, before and after GRPO.
        log: the trainer's log of GRPO with the tool.
    """
    *_, before, after = outcomes
    points = curves_of(log)
    curves = "".join(curve(title, points[name]) for name, title in CURVES.items() if name in points)
    wrong = [place for place in range(len(after.pages)) if not after.correct[place]]
    shown = [*range(min(NUM_SHOWN, len(after.pages)))]
    mistakes = [place for place in wrong if place not in shown][: NUM_SHOWN // 2]
    cards = {
        f"The first {len(shown)} held-out pages": shown,
        f"Still wrong after GRPO: {len(wrong)}, some of them": mistakes,
    }
    gallery = "".join(
        f"<h2>{title}</h2>{''.join(_card(place, before, after) for place in places)}"
        for title, places in cards.items()
        if places
    )
    body = (
        f'<h1>A small VLM learns to zoom</h1><p class="summary">{escape(subtitle)}</p>'
        f"<p>A page has {ROWS} x {COLUMNS} notes with handwritten numbers. The task is “{escape(FIND)}” The model sees the page"
        " in miniature. Its tool <code>zoom(row, column)</code> returns one note at full resolution. GRPO rewards only right"
        " answers, not calls.</p>"
        f'{_table(outcomes)}<h2>GRPO with the tool</h2><div class="curves">{curves}</div><script>{SCRIPT}</script>{gallery}'
    )
    write_atomic(path, document("A small VLM learns to zoom", body, STYLE))
