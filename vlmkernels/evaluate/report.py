"""What an evaluation leaves: JSON for programs, Markdown for notes; and curves over training steps."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmkernels.evaluate.evaluation import Evaluation
from vlmkernels.evaluate.page import number, p_value, signed
from vlmkernels.report.curves import Point
from vlmkernels.report.run import curves_of as curves_of_entries
from vlmkernels.report.run import read_lines, read_state


def _plain(value: Any) -> Any:
    """Named tuples as dicts, NaN as null."""
    if hasattr(value, "_asdict"):
        return {name: _plain(item) for name, item in value._asdict().items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def to_json(evaluation: Evaluation, other: Evaluation | None = None) -> dict:
    """``{"metrics": {group: {metric: {value, low, high, num_samples, hidden, cost}}}, "difference": {...}}``."""
    found: dict[str, Any] = {"metrics": {}}
    for result in evaluation.results:
        hidden = {} if result.hidden is None else {"hidden": _plain(result.hidden), "cost": _plain(result.cost)}
        found["metrics"].setdefault(result.group, {})[result.metric] = _plain(result.estimate) | hidden
    if other is not None:
        for (group, metric), difference in evaluation.minus(other).items():
            found.setdefault("difference", {}).setdefault(group, {})[metric] = _plain(difference)
    return found


def to_markdown(evaluation: Evaluation, other: tuple[str, Evaluation] | None = None) -> str:
    """Tables of the metrics, and of the differences from another run."""
    view, percent = evaluation.hidden_view, f"{100 * evaluation.scoring.confidence:g} % interval"
    hidden = f" image {view} | image's worth |" if view else ""
    lines = [
        f"| group | metric | value | {percent} |{hidden}",
        f"| --- | --- | ---: | ---: |{' ---: | ---: |' if view else ''}",
    ]
    for result in evaluation.results:
        share = evaluation.groups[result.group].metrics[result.metric].share
        value, low, high, _ = result.estimate
        cells = [result.group, result.metric, number(value, share), f"{number(low, share)} to {number(high, share)}"]
        if view:
            cells += [
                number(result.hidden.value, share),
                f"{signed(result.cost.value, share)} (p {p_value(result.cost.p_value)})",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    if other is not None:
        name, run = other
        lines += ["", f"Compared with {name}, paired by sample:", "", f"| group | metric | difference | {percent} | p | test |"]
        lines.append("| --- | --- | ---: | ---: | ---: | --- |")
        for (group, metric), difference in evaluation.minus(run).items():
            share = evaluation.groups[group].metrics[metric].share
            low, high = signed(difference.low, share), signed(difference.high, share)
            cells = [
                group,
                metric,
                signed(difference.value, share),
                f"{low} to {high}",
                p_value(difference.p_value),
                difference.test,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def curves_of(evaluations: Sequence[tuple[float, Evaluation]]) -> dict[str, list[Point]]:
    """The metrics of several (step, evaluation) as curves."""
    curves: dict[str, list[Point]] = {}
    for step, evaluation in evaluations:
        for result in evaluation.results:
            curves.setdefault(f"{result.group}: {result.metric}", []).append(Point(step, *result.estimate[:3]))
    return curves


def curves_of_log(path: str | Path) -> dict[str, list[Point]]:
    """Rewards and evaluations in a trainer's log: metrics.jsonl, trainer_state.json, or JSON with a list ``log_history``."""
    path = Path(path)
    curves = curves_of_entries(read_lines(path) if path.suffix == ".jsonl" else read_state(path))
    is_mean = lambda name: name == "reward" or (name.startswith("rewards/") and name.endswith("/mean"))  # noqa: E731
    return {name: points for name, points in curves.items() if is_mean(name.removeprefix("eval_"))}
