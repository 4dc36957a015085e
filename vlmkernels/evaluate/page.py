"""A self-contained HTML page: metrics with intervals, curves, a comparison, and samples with their boxes."""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from vlmkernels.data.samples import still_images
from vlmkernels.evaluate.evaluation import ALL, Comparison, Evaluation, Result
from vlmkernels.evaluate.statistics import Difference
from vlmkernels.evaluate.tasks import COMMON, TASKS
from vlmkernels.record.files import write_atomic
from vlmkernels.record.html import document, picture, thumbnail
from vlmkernels.record.turns import Shots, count, turns_html
from vlmkernels.report.curves import SCRIPT as CURVES_SCRIPT
from vlmkernels.report.curves import Point, curve
from vlmkernels.rewards.answers import Boxes, as_boxes

OWN_STYLE = """
body { max-width: 78rem; }
nav { position: sticky; top: 0; z-index: 1; background: Canvas; padding: .4rem 0; }
nav { display: flex; gap: .4rem 1rem; flex-wrap: wrap; }
nav label { cursor: pointer; }
tbody th { text-align: left; padding-top: .9rem; font-size: 1rem; }
.metrics td, .metrics th { white-space: nowrap; } .metrics td:first-child, .metrics th:first-child { width: auto; }
.metrics td.doc { text-align: left; opacity: .7; width: 100%; white-space: normal; }
.range { position: relative; width: 9rem; height: 1em; background: var(--soft); border-radius: 3px; display: inline-block; }
.range i { position: absolute; top: 0; bottom: 0; background: #3b82f677; border-radius: 3px; min-width: 2px; }
.range b { position: absolute; top: -2px; bottom: -2px; width: 2px; background: #3b82f6; }
.good { color: rgb(var(--good)); } .bad { color: rgb(var(--bad)); }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); }
.card { border: 1px solid var(--line); border-radius: 10px; overflow: hidden; display: flex; flex-direction: column; }
.card > div, .card > pre { padding: .5rem .8rem; } .card > pre { background: var(--soft); }
.pictures { display: flex; gap: .5rem; flex-wrap: wrap; }
.picture { position: relative; line-height: 0; } .picture img { image-rendering: pixelated; }
.picture svg { position: absolute; inset: 0; width: 100%; height: 100%; }
rect, circle.mark { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke; }
.reference { stroke: rgb(46 160 67); } .prediction { stroke: #c026d3; stroke-dasharray: 5 3; }
.key { display: inline-block; width: 1.6em; border-top: 2px solid; vertical-align: middle; margin-right: .3em; }
.key.prediction { border-color: #c026d3; border-top-style: dashed; } .key.reference { border-color: rgb(46 160 67); }
dl { margin: 0; padding: .5rem .8rem .7rem; display: grid; grid-template-columns: auto 1fr; gap: .1rem .8rem; }
dt { opacity: .7; font-size: .85rem; } dd { margin: 0; overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, monospace; }
.card .turn { grid-template-columns: minmax(0, 1fr); }
.wrong-only .card.correct, .card.off { display: none; }
"""
SCRIPT = """
const wrong = document.querySelector('#wrong'), group = document.querySelector('#group')
const show = () => {
  document.querySelector('.cards').classList.toggle('wrong-only', wrong.checked)
  for (const card of document.querySelectorAll('.card'))
    card.classList.toggle('off', group.value !== '' && card.dataset.group !== group.value)
}
wrong.onchange = group.onchange = show
"""


def number(value: float, share: bool) -> str:
    """Format the value of a metric, in percent if it is a share."""
    if math.isnan(value):
        return "–"
    return f"{100 * value:.1f} %" if share else f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def signed(value: float, share: bool) -> str:
    """Format a difference with its sign, in percentage points if the metric is a share."""
    return "–" if math.isnan(value) else f"{100 * value:+.1f}" if share else f"{value:+.3f}"


def p_value(value: float) -> str:
    """Format a p-value."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _range(result: Result, share: bool) -> str:
    """Return the interval as a bar from 0 to 1."""
    value, low, high, _ = result.estimate
    if not share or math.isnan(value):
        return ""
    low, high, value = (100 * min(max(x, 0.0), 1.0) for x in (low, high, value))
    bar = f'<i style="left: {low:.1f}%; right: {100 - high:.1f}%"></i><b style="left: {value:.1f}%"></b>'
    return f'<span class="range">{bar}</span>'


def _tone(difference: Difference, sign: int, confidence: float) -> str:
    """Return the CSS class of a difference: good, bad, or none if it is not significant."""
    if sign == 0 or math.isnan(difference.value) or difference.p_value > 1 - confidence:
        return ""
    return "good" if difference.value * sign > 0 else "bad"


def _metric_cells(evaluation: Evaluation, result: Result) -> str:
    """Return the cells of one row of the table of metrics."""
    metric, view = evaluation.groups[result.group].metrics[result.metric], evaluation.hidden_view
    value, low, high, _ = result.estimate
    cells = [f"<td>{escape(result.metric)}</td><td><b>{number(value, metric.share)}</b></td>"]
    interval = "–" if math.isnan(low) else f"{number(low, metric.share)} to {number(high, metric.share)}"
    cells.append(f"<td>{interval}</td><td>{_range(result, metric.share)}</td>")
    if view:
        tone = _tone(result.cost, metric.sign, evaluation.scoring.confidence)
        cells.append(f"<td>{number(result.hidden.value, metric.share)}</td>")
        cells.append(f'<td class="{tone}">{signed(result.cost.value, metric.share)}</td>')
    return f'{"".join(cells)}<td class="doc">{escape(metric.doc)}</td>'


def _metrics_table(evaluation: Evaluation) -> str:
    """Return the table of metrics. Groups after the first leave out metrics of ``COMMON`` that are 0."""
    view, confidence = evaluation.hidden_view, evaluation.scoring.confidence
    hidden = [f"image {view}", "effect of the image"] if view else []
    head = ["metric", "value", f"{100 * confidence:g} % interval", "", *hidden, ""]
    rows, last, first = [], None, next(iter(evaluation.groups))
    for result in evaluation.results:
        estimates = [result.estimate, *([result.hidden] if view else [])]
        if result.group != first and result.metric in COMMON and not any(e.value or e.high for e in estimates):
            continue
        if result.group != last:
            count = len(evaluation.groups[result.group].answers["image"].indices)
            rows.append(f'<tr><th colspan="{len(head)}">{escape(result.group)} <small>({count} samples)</small></th></tr>')
            last = result.group
        rows.append(f"<tr>{_metric_cells(evaluation, result)}</tr>")
    titles = "".join(f"<th>{title}</th>" for title in head)
    return (
        f'<div class="wide"><table class="metrics"><thead><tr>{titles}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _comparison_table(comparison: Comparison) -> str:
    """Return the table of differences from another run, without metrics that did not change."""
    evaluation, other, confidence = comparison.run, comparison.other, comparison.run.scoring.confidence
    rows = []
    for (group, name_of_metric), difference in comparison.differences.items():
        if (difference.low, difference.high) == (0, 0):
            continue
        metric = evaluation.groups[group].metrics[name_of_metric]
        theirs = other.value(group, name_of_metric)
        tone = _tone(difference, metric.sign, confidence)
        rows.append(
            f"<tr><td>{escape(group)}: {escape(name_of_metric)}</td><td>{number(theirs, metric.share)}</td>"
            f"<td>{number(theirs + difference.value, metric.share)}</td>"
            f'<td class="{tone}"><b>{signed(difference.value, metric.share)}</b></td>'
            f"<td>{signed(difference.low, metric.share)} to {signed(difference.high, metric.share)}</td>"
            f"<td>{p_value(difference.p_value)}</td><td>{difference.test}</td></tr>"
        )
    titles = ("metric", "before", "now", "difference", f"{100 * confidence:g} % interval", "p", "test")
    head = "".join(f"<th>{title}</th>" for title in titles)
    return (
        f"<h2>{escape(comparison.name)} compared with {escape(comparison.other_name)}</h2>"
        f"<p>Paired by sample. Colored if p &lt; {1 - confidence:.2g}. Metrics that did not change are left out.</p>"
        f'<div class="wide"><table class="metrics"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _shapes(value: Any, name: str) -> str:
    """Return the SVG of a point, a box or boxes."""
    if value is None:
        return ""
    if len(value) == 2:
        return f'<circle class="mark {name}" cx="{value[0]:g}" cy="{value[1]:g}" r="1.5%"/>'
    return "".join(
        f'<rect class="{name}" x="{x1:g}" y="{y1:g}" width="{x2 - x1:g}" height="{y2 - y1:g}"/>'
        for x1, y1, x2, y2 in (value.boxes if isinstance(value, Boxes) else [value])
    )


def _images_html(evaluation: Evaluation, index: int, kind: str, values: list) -> str:
    """Return a sample's images, the first one with the reference and the predictions drawn over it."""
    images = still_images(evaluation.rows.sample(index))
    shapes = ""
    if kind in ("box", "boxes", "point"):
        reference = as_boxes(evaluation.rows.references[index])
        shapes = _shapes(reference, "reference") + "".join(_shapes(value, "prediction") for value in values)
    parts = []
    for place, image in enumerate(images):
        overlay = f'<svg viewBox="0 0 {image.width} {image.height}">{shapes}</svg>' if place == 0 and shapes else ""
        parts.append(f'<div class="picture">{picture(thumbnail(image))}{overlay}</div>')
    return f'<div class="pictures">{"".join(parts)}</div>' if parts else ""


def _card(evaluation: Evaluation, group: str, place: int) -> str:
    """Return a sample's images, prompt and reference, and its completions with their rewards."""
    answers = evaluation.groups[group].answers["image"]
    index = answers.indices[place]
    task = TASKS[evaluation.rows.tasks[index]]
    correct = None if answers.correct is None else bool(answers.correct[place].all())
    reference = answers.references[place]
    rows = [] if reference is None else [("reference", escape(str(reference)), "")]
    blocks, shots = [], Shots()
    for seed, completion in enumerate(answers.texts[place]):
        value = answers.values[place][seed]
        tone = "" if answers.correct is None else "good" if answers.correct[place, seed] else "bad"
        rows.append(("prediction", escape(completion) or "–", tone))
        if value is None:
            rows.append(("", "no answer could be parsed", "bad"))
        rows += [
            (escape(name), "not scored" if math.isnan(values[place, seed]) else f"{values[place, seed]:.3f}", "")
            for name, values in answers.rewards.items()
        ]
        if (turns := evaluation.completions["image"][index][seed].turns) is not None:
            blocks += [_details([*rows, ("trajectory", str(count(turns)), "")]), f"<div>{turns_html(turns, shots)}</div>"]
            rows = []
    blocks += [_details(rows)] if rows else []
    state = "" if correct is None else "correct" if correct else "wrong"
    images = _images_html(evaluation, index, task.answer, answers.values[place])
    title = f"<div><small>{escape(group)} · sample {index}{f' · {state}' if state else ''}</small></div>"
    return (
        f'<div class="card {state}" data-group="{escape(group)}"{shots.style()}>{title}'
        f"{f'<div>{images}</div>' if images else ''}<pre>{escape(answers.prompts[place])}</pre>{''.join(blocks)}</div>"
    )


def _details(rows: list[tuple[str, str, str]]) -> str:
    """Return a list of names and texts, each with a CSS class."""
    items = "".join(f'<dt>{name}</dt><dd class="{tone}">{text}</dd>' for name, text, tone in rows)
    return f"<dl>{items}</dl>"


def _chosen(evaluation: Evaluation, group: str, limit: int) -> list[int]:
    """Return the first samples of a group, half of them wrong ones if there are enough."""
    answers = evaluation.groups[group].answers["image"]
    places = range(len(answers.indices))
    wrong = [] if answers.correct is None else [place for place in places if not answers.correct[place].all()]
    chosen = wrong[: (limit + 1) // 2]
    return sorted({*chosen, *[place for place in places if place not in chosen][: limit - len(chosen)]})


def _gallery(evaluation: Evaluation, limit: int) -> str:
    names = [name for name in evaluation.groups if name != ALL]
    cards = "".join(_card(evaluation, name, place) for name in names for place in _chosen(evaluation, name, limit))
    options = "".join(f'<option value="{escape(name)}">{escape(name)}</option>' for name in names)
    return (
        '<h2>Samples</h2><nav><label><input type="checkbox" id="wrong"> wrong answers only</label>'
        f'<select id="group"><option value="">all groups</option>{options}</select>'
        '<span><i class="key reference"></i>reference</span><span><i class="key prediction"></i>prediction</span></nav>'
        f'<div class="cards">{cards}</div><script>{SCRIPT}</script>'
    )


def write_page(
    path: Path,
    title: str,
    subtitle: str,
    evaluation: Evaluation,
    *,
    comparisons: Sequence[Comparison] = (),
    curves: dict[str, Sequence[Point]] | None = None,
    samples_per_group: int = 12,
) -> None:
    """Write the page.

    Args:
        path: path of the HTML file.
        title, subtitle: title and subtitle of the page.
        evaluation: the metrics and samples.
        comparisons: runs to compare.
        curves: curves over training steps, by title.
        samples_per_group: maximum number of samples of each group in the gallery.
    """
    svgs = "".join(curve(name, points) for name, points in (curves or {}).items())
    parts = [
        f'<h1>{escape(title)}</h1><p class="summary">{escape(subtitle)}</p>',
        f"<h2>Metrics</h2>{_metrics_table(evaluation)}",
        *map(_comparison_table, comparisons),
        f'<h2>Over training steps</h2><div class="curves">{svgs}</div><script>{CURVES_SCRIPT}</script>' if svgs else "",
        _gallery(evaluation, samples_per_group),
    ]
    write_atomic(path, document(title, "".join(parts), OWN_STYLE))
