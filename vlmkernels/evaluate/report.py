"""The results of an evaluation as JSON and Markdown, and curves over training steps."""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from vlmkernels.evaluate.evaluation import Comparison, Evaluation
from vlmkernels.evaluate.page import number, p_value, signed
from vlmkernels.evaluate.statistics import Difference
from vlmkernels.record.reading import read_lines, read_state
from vlmkernels.report.curves import Point
from vlmkernels.report.run import curves_of as curves_of_entries


def _plain(value: Any) -> Any:
    """Convert named tuples to dicts and NaN to None."""
    if hasattr(value, "_asdict"):
        return {name: _plain(item) for name, item in value._asdict().items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _cell(name: str) -> str:
    """Return a name from the data as one cell of a Markdown table."""
    return escape(" ".join(name.split()), quote=False).replace("|", "\\|")


def _column(name: str, width: int = 40) -> str:
    """Return a name as one cell of a table in a terminal, without its middle if it is long."""
    name = "".join(char if char.isprintable() else " " for char in name)
    return name if len(name) <= width else f"{name[: width // 2 - 1]}…{name[-(width // 2) :]}"


def differences_to_json(differences: dict[tuple[str, str], Difference]) -> dict[str, dict[str, Any]]:
    """Return ``{group: {metric: {value, low, high, ...}}}``."""
    found: dict[str, dict[str, Any]] = {}
    for (group, metric), difference in differences.items():
        found.setdefault(group, {})[metric] = _plain(difference)
    return found


def to_json(evaluation: Evaluation, other: Evaluation | None = None) -> dict:
    """Return ``{"metrics": {group: {metric: {value, low, high, num_samples, hidden, cost}}}, "difference": {...}}``.

    Args:
        evaluation: the metrics.
        other: a run to compare with, for "difference".
    """
    found: dict[str, Any] = {"metrics": {}}
    for result in evaluation.results:
        hidden = {} if result.hidden is None else {"hidden": _plain(result.hidden), "cost": _plain(result.cost)}
        found["metrics"].setdefault(result.group, {})[result.metric] = _plain(result.estimate) | hidden
    if other is not None:
        found["difference"] = differences_to_json(evaluation.minus(other))
    return found


def to_markdown(evaluation: Evaluation, comparisons: Sequence[Comparison] = ()) -> str:
    """Return tables of the metrics, and of the differences between runs."""
    view, percent = evaluation.hidden_view, f"{100 * evaluation.scoring.confidence:g} % interval"
    hidden = f" image {view} | effect of the image |" if view else ""
    lines = [
        f"| group | metric | value | {percent} |{hidden}",
        f"| --- | --- | ---: | ---: |{' ---: | ---: |' if view else ''}",
    ]
    for result in evaluation.results:
        share = evaluation.groups[result.group].metrics[result.metric].share
        value, low, high, _ = result.estimate
        cells = [
            _cell(result.group),
            _cell(result.metric),
            number(value, share),
            f"{number(low, share)} to {number(high, share)}",
        ]
        if view:
            cells += [
                number(result.hidden.value, share),
                f"{signed(result.cost.value, share)} (p {p_value(result.cost.p_value)})",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    for comparison in comparisons:
        lines += ["", f"{_cell(comparison.name)} compared with {_cell(comparison.other_name)}, paired by sample:", ""]
        lines += [f"| group | metric | difference | {percent} | p | test |", "| --- | --- | ---: | ---: | ---: | --- |"]
        for (group, metric), difference in comparison.differences.items():
            share = comparison.run.groups[group].metrics[metric].share
            interval = f"{signed(difference.low, share)} to {signed(difference.high, share)}"
            cells = [
                _cell(group),
                _cell(metric),
                signed(difference.value, share),
                interval,
                p_value(difference.p_value),
                difference.test,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def to_text(evaluations: dict[str, Evaluation]) -> str:
    """Return a table of all metrics for a terminal: with intervals for one run, with a column per run for several."""
    first = next(iter(evaluations.values()))
    columns = ["value", "interval"] if len(evaluations) == 1 else map(_column, evaluations)
    rows = [["group", "metric", *columns]]
    for result in first.results:
        share = first.groups[result.group].metrics[result.metric].share
        if len(evaluations) == 1:
            value, low, high, _ = result.estimate
            cells = [number(value, share), f"{number(low, share)} to {number(high, share)}"]
        else:
            cells = [number(run.value(result.group, result.metric), share) for run in evaluations.values()]
        rows.append([_column(result.group), _column(result.metric), *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def curves_of(evaluations: Sequence[tuple[float, Evaluation]]) -> dict[str, list[Point]]:
    """Return the metrics of evaluations at several training steps as curves, by name."""
    curves: dict[str, list[Point]] = {}
    for step, evaluation in evaluations:
        for result in evaluation.results:
            curves.setdefault(f"{result.group}: {result.metric}", []).append(Point(step, *result.estimate[:3]))
    return curves


def curves_of_log(path: str | Path) -> dict[str, list[Point]]:
    """Return the mean rewards of training and evaluation in a trainer's log as curves, by name.

    Args:
        path: path of metrics.jsonl, of trainer_state.json, or of another JSON file with a list ``log_history``.
    """
    path = Path(path)
    curves = curves_of_entries(read_lines(path) if path.suffix == ".jsonl" else read_state(path))
    return {name: points for name, points in curves.items() if _is_mean_reward(name.removeprefix("eval_"))}


def _is_mean_reward(name: str) -> bool:
    return name == "reward" or (name.startswith("rewards/") and name.endswith("/mean"))
