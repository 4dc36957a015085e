"""Evaluations of saved predictions."""

import json
from pathlib import Path

from vlmkernels.evaluate.evaluation import Evaluation, Scoring
from vlmkernels.evaluate.predictions import Predictions
from vlmkernels.evaluate.tasks import TASKS


def given(path: Path, completions: list, **more) -> Predictions:
    """Write predictions, one text or a list of texts per sample, and read them."""
    lines = [
        json.dumps({"index": i, **({"completions": c} if isinstance(c, list) else {"completion": c}), **more})
        for i, c in enumerate(completions)
    ]
    path.write_text("\n".join(lines) + "\n")
    return Predictions.read(path)


def values(
    tmp_path, task: str, references: list, completions: list, columns: dict | None = None, **scoring
) -> dict[str, float]:
    """Return every metric of a task, for one group."""
    rows = [{"prompt": "what?", "task": task, TASKS[task].column: r, **(columns or {})} for r in references]
    options = {"replicates": 2, **scoring}
    evaluation = Evaluation(given(tmp_path / "p.jsonl", completions), rows, Scoring(**options))
    return {result.metric: result.estimate.value for result in evaluation.results}
