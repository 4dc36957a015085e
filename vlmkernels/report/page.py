"""Write the page about a training run: curves, time per phase, tokens and images, samples, configuration and versions."""

import json
import math
import time
from collections.abc import Sequence
from html import escape
from typing import Any

from vlmkernels.doctor import read_run
from vlmkernels.record.completions import load_step, step_html
from vlmkernels.record.html import document, number, short
from vlmkernels.record.metrics import (
    COMPLETIONS,
    MISMATCH,
    OPTIMIZER,
    PHASES,
    POLICY,
    REWARDS,
    THROUGHPUT,
    TIME,
    TOOLS,
    describe,
    is_summary,
    order,
)
from vlmkernels.report.curves import COLORS, GRAY, Point, bars, curve, stack
from vlmkernels.report.curves import SCRIPT as CURVES_SCRIPT
from vlmkernels.report.findings import STYLE as FINDINGS_STYLE
from vlmkernels.report.findings import findings_html
from vlmkernels.report.run import Run

MAX_STEPS, MAX_GROUPS = 8, 8  # maximum numbers of steps in the section of samples, and of prompts per step
EVALUATION, OTHER = "Evaluation", "Other"
SECTIONS = (REWARDS, EVALUATION, COMPLETIONS, TOOLS, POLICY, MISMATCH, OPTIMIZER, THROUGHPUT, OTHER)

STYLE = """
body { max-width: 78rem; }
h2 small { font-weight: 400; opacity: .7; }
.tiles { display: grid; gap: .7rem; grid-template-columns: repeat(auto-fill, minmax(min(11rem, 46%), 1fr)); margin: 1rem 0; }
.tiles div { border: 1px solid var(--line); border-radius: 10px; padding: .5rem .8rem; }
.tiles b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.tiles span { opacity: .7; font-size: .85rem; }
.warning { border-left: 4px solid rgb(var(--bad)); padding: .3rem .8rem; background: var(--soft); }
.two { display: grid; gap: 1rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); }
.two { align-items: start; }
.two svg { width: 100%; height: auto; overflow: visible; } .two svg text { font-size: 7px; }
.bars td { white-space: nowrap; } .bars td:first-child { width: auto; } .bars td:nth-child(2) { width: 100%; text-align: left; }
.bars i { display: block; height: .8em; margin-top: .35em; border-radius: 3px; min-width: 1px; }
.still { opacity: .75; font-size: .85rem; overflow-wrap: anywhere; }
.facts td { text-align: left; overflow-wrap: anywhere; }
.facts td:first-child { width: auto; white-space: nowrap; opacity: .8; }
.facts td:last-child { width: 100%; font: 13px/1.45 ui-monospace, monospace; }
.steps { display: flex; gap: .3rem .9rem; flex-wrap: wrap; } .steps label { cursor: pointer; } .step[hidden] { display: none; }
details { margin: .5rem 0; } summary { cursor: pointer; }
@media (max-width: 40rem) { .facts td { display: block; width: auto; } .facts td + td { border: 0; padding-top: 0; } }
"""
SCRIPT = """
const chosen = document.querySelectorAll('.steps input')
for (const input of chosen) input.onchange = () => {
  for (const step of document.querySelectorAll('.step')) step.hidden = step.dataset.step !== input.value
}
"""


def _ends(points: Sequence[Point]) -> tuple[float, float]:
    """Return the means of the first and last tenth of a curve. Both cover at least 10 points, or half of a shorter curve."""
    points = [point for point in points if math.isfinite(point.value)]
    count = max(len(points) // 10, min(10, len(points) // 2), 1)
    return _mean(points[:count]), _mean(points[-count:])


def _mean(points: Sequence[Point]) -> float:
    """Return the mean of the finite values; NaN if there are none."""
    values = [point.value for point in points if math.isfinite(point.value)]
    return sum(values) / len(values) if values else math.nan


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} seconds"


def _status(run: Run) -> str:
    max_steps = run.about.get("max_steps")
    text = f"step {run.step:,}" + (f" of {max_steps:,}" if isinstance(max_steps, int) and max_steps >= run.step else "")
    if run.is_finished:
        return f"{text}, finished"
    return f"{text}, not finished; last logged {_duration(time.time() - run.source.stat().st_mtime)} before this page"


def _tiles(curves: dict[str, list[Point]]) -> str:
    tiles = []
    if "reward" in curves:
        first, last = _ends(curves["reward"])
        tiles.append((f"{short(first)} → {short(last)}", "reward, start → end"))
    if evaluated := [name for name in curves if name.startswith("eval_") and name.endswith("reward")]:
        points = curves[evaluated[0]]
        tiles.append((f"{short(points[0].value)} → {short(points[-1].value)}", f"{evaluated[0]}, first → last"))
    if "step_time" in curves:
        tiles.append((f"{short(_mean(curves['step_time']))} s", "per step, excluding evaluation and checkpoints"))
    if "tokens_per_second" in curves:
        tiles.append((f"{number(round(_mean(curves['tokens_per_second'])))}", "tokens per second"))
    if _mean(curves.get("tokens_run", [])) > 0 and "tokens_if_unshared" in curves:
        ratio = _mean(curves["tokens_if_unshared"]) / _mean(curves["tokens_run"])
        tiles.append((f"{ratio:.2f}×", "as many tokens without prefix sharing"))
    return f'<div class="tiles">{"".join(f"<div><b>{escape(v)}</b><span>{escape(t)}</span></div>" for v, t in tiles)}</div>'


def _warnings(curves: dict[str, list[Point]]) -> str:
    """Warn about metrics whose last value is not finite."""
    lines = []
    for name, points in curves.items():
        if not math.isfinite(points[-1].value):
            first = next(k for k in range(len(points), 0, -1) if k == 1 or math.isfinite(points[k - 2].value))
            lines.append(
                f'<p class="warning">{escape(name)} has been {points[-1].value} since step {points[first - 1].step:g}</p>'
            )
    return "".join(lines)


def _section_of(name: str) -> str:
    if name.startswith("eval_"):
        return EVALUATION
    metric = describe(name)
    return metric.section if metric else OTHER


def _curves(curves: dict[str, list[Point]]) -> str:
    """Return the sections of curves. Detail metrics are collapsed; constant metrics are listed with their value."""
    drawn: dict[str, list[str]] = {section: [] for section in SECTIONS}
    details: dict[str, list[str]] = {section: [] for section in SECTIONS}
    still: dict[str, list[str]] = {section: [] for section in SECTIONS}
    for name, points in sorted(curves.items(), key=lambda item: order(item[0])):
        section = _section_of(name)
        if section == TIME or is_summary(name) or name == "epoch":
            continue
        metric = describe(name)
        if figure := curve(name, points, metric.meaning if metric else ""):
            (details if metric and metric.is_detail else drawn)[section].append(figure)
        else:
            still[section].append(f"{name} {number(points[-1].value)}")
    parts = []
    for section in SECTIONS:
        if drawn[section] or details[section] or still[section]:
            more = f'<div class="curves">{"".join(details[section])}</div>'
            more = f"<details><summary>{len(details[section])} more</summary>{more}</details>" if details[section] else ""
            rest = f'<p class="still">Constant: {escape(", ".join(still[section]))}</p>' if still[section] else ""
            parts.append(f'<h2>{section}</h2><div class="curves">{"".join(drawn[section])}</div>{more}{rest}')
    return "".join(parts)


def _phases(run: Run) -> str:
    """Return the section about time: a stacked chart of the seconds per phase, and each phase's share of the total."""
    entries = [entry for entry in run.entries if "time/other" in entry]
    if not entries:
        return ""
    parts = {name: [entry.get(f"time/{name}") or 0.0 for entry in entries] for name in PHASES}
    parts = {name: values for name, values in parts.items() if any(values)}
    steps = [entry["step"] for entry in entries]
    durations = [end - start for start, end in zip([_before(run, steps[0]), *steps], steps, strict=False)]
    totals = {name: sum(v * n for v, n in zip(values, durations, strict=True)) for name, values in parts.items()}
    total = sum(totals.values()) or 1.0
    rows = [(name, value, f"{_seconds(value)} · {value / total:.1%}") for name, value in totals.items()]
    colors = [color for name, color in zip(PHASES, COLORS, strict=True) if name in parts]
    drawing = stack("seconds per optimizer step", steps, parts, colors)
    meanings = "".join(f"<tr><td>{name}</td><td>{escape(PHASES[name])}</td></tr>" for name in parts)
    return (
        f"<h2>Time <small>{_seconds(total)} in {sum(durations):,} steps</small></h2>"
        f'<div class="two">{drawing}<div class="wide">{bars(rows, colors)}</div></div>'
        f'<details><summary>Description of the phases</summary><table class="facts">{meanings}</table></details>'
    )


def _before(run: Run, first: int) -> int:
    """Return the step at which the period of the first log entry begins, assuming that it is as long as the next period."""
    logged = sorted({entry["step"] for entry in run.entries if "time/other" in entry})
    return max(first - (logged[1] - logged[0] if len(logged) > 1 else first), 0)


def _seconds(value: float) -> str:
    if value >= 3600:
        return f"{value / 3600:.1f} h"
    return f"{value / 60:.1f} min" if value >= 120 else f"{value:.3g} s"


def _throughput(curves: dict[str, list[Point]]) -> str:
    """Return the section about tokens and images per step, with and without prefix sharing."""
    rows = []
    for what in ("tokens", "images"):
        run, unshared = (_mean(curves.get(f"{what}_{which}", [])) for which in ("run", "if_unshared"))
        if unshared > 0:
            rows += [(what, run, number(round(run, 1))), (f"{what}, unshared", unshared, number(round(unshared, 1)))]
    if not rows:
        return ""
    # Tokens and images have separate scales.
    tables = "".join(bars(rows[start : start + 2], (COLORS[0], GRAY)) for start in range(0, len(rows), 2))
    return (
        "<h2>Tokens and images per step <small>processed by the model in sampling and all passes; unshared: as if each"
        f' completion had its own copy of the prompt</small></h2><div class="two">{tables}</div>'
    )


def _samples(run: Run) -> str:
    """Return the section of samples: completions from up to MAX_STEPS stored steps. At first, only the last one is visible."""
    steps = list(run.completions)
    if not steps:
        return '<h2>Samples</h2><p class="still">No completions are stored; set log_completions=True to store some.</p>'
    most = min(MAX_STEPS, len(steps))
    chosen = sorted({steps[round(k * (len(steps) - 1) / max(most - 1, 1))] for k in range(most)})
    inputs, parts = [], []
    for step in chosen:
        last = step == chosen[-1]
        checked = " checked" if last else ""
        inputs.append(f'<label><input type="radio" name="step" value="{step}"{checked} autocomplete="off"> {step}</label>')
        shown = step_html(load_step(run.completions[step]), MAX_GROUPS)
        parts.append(f'<div class="step" data-step="{step}"{"" if last else " hidden"}>{shown}</div>')
    count = f"{len(chosen)} of {len(steps)} stored steps" if len(chosen) < len(steps) else "all stored steps"
    return (
        f'<h2>Samples <small>{count}</small></h2><div class="steps">step {"".join(inputs)}</div>{"".join(parts)}'
        f"<script>{SCRIPT}</script>"
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _facts(facts: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{escape(str(name))}</td><td>{escape(_text(value))}</td></tr>" for name, value in facts.items() if value != ""
    )
    return f'<table class="facts">{rows}</table>'


def _plain(value: Any) -> Any:
    """Write a mapping as "name value, ..." and a list of them as one line each."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items() if item not in (None, "", {}, []))
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return "; ".join(_plain(item) for item in value)
    return value


def _data_and_rewards(about: dict[str, Any]) -> str:
    """Return the tables of the datasets, the rewards with their weights, and the adapters."""
    facts = {name: about[name] for name in ("dataset", "eval_dataset", "adapters") if about.get(name)}
    for reward in about.get("rewards") or ():
        facts[f"reward {reward.get('name')}"] = {name: value for name, value in reward.items() if name != "name"}
    return f"<h2>Data and rewards</h2>{_facts({name: _plain(value) for name, value in facts.items()})}" if facts else ""


def _configuration(about: dict[str, Any]) -> str:
    if not about:
        return '<h2>Configuration</h2><p class="still">The configuration was not recorded: there is no run.json.</p>'
    arguments = about.get("arguments", {})
    given = {name: arguments[name] for name in sorted(about.get("changed", ())) if name in arguments}
    run = {name: about[name] for name in ("started", "from_step", "max_steps", "processes") if name in about}
    return (
        f"<h2>Configuration</h2>{_facts({**run, **about.get('model', {})})}"
        f"{_data_and_rewards(about)}"
        f"<h2>Arguments <small>that differ from their defaults</small></h2>{_facts(given)}"
        f"<details><summary>All {len(arguments)} arguments</summary>{_facts(dict(sorted(arguments.items())))}</details>"
        f"<details><summary>The model's configuration</summary>{_facts(about.get('model config', {}))}</details>"
        f"<h2>Versions and environment</h2>{_facts({**about.get('versions', {}), **about.get('environment', {})})}"
    )


def run_page(run: Run) -> str:
    """Return the page about a run as HTML."""
    curves, name = run.curves(), run.folder.resolve().name
    empty = "" if curves else '<p class="warning">Nothing has been logged yet.</p>'
    written = time.strftime("%Y-%m-%d %H:%M")
    parts = [
        f'<h1>{escape(name)}</h1><p class="summary">{escape(_status(run))} · from {escape(run.source.name)} · {written}</p>',
        empty,
        _warnings(curves),
        _tiles(curves) if curves else "",
        findings_html(read_run(run.folder)),
        _curves({name: points for name, points in curves.items() if _section_of(name) in (REWARDS, EVALUATION)}),
        _phases(run),
        _throughput(curves),
        _curves({name: points for name, points in curves.items() if _section_of(name) not in (REWARDS, EVALUATION)}),
        _samples(run),
        _configuration(run.about),
        f"<script>{CURVES_SCRIPT}</script>",
    ]
    return document(name, "".join(parts), STYLE + FINDINGS_STYLE)
