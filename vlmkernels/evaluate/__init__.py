"""Evaluation of a model's answers: metrics with confidence intervals, with the scoring functions that reward training uses.

    predictions = predict(model, processor, dataset, Decoding(num_generations=8, temperature=1.0), "predictions.jsonl")
    evaluation = Evaluation(predictions, dataset, Scoring(match="lmms-eval"))
    evaluation.value("grounding", "acc@0.5"), to_markdown(evaluation), to_json(evaluation)

| module | contents |
| --- | --- |
| ``predictions`` | files of completions |
| ``sampling`` | samples completions, with or without tools; a killed run resumes where it stopped |
| ``tasks`` | the answers, references and metrics of each task; differences of other harnesses |
| ``metrics``, ``vqa``, ``coco`` | the metrics by name |
| ``statistics`` | bootstrap intervals, paired comparisons, pass@k, maj@k |
| ``evaluation`` | all metrics of a dataset, in groups |
| ``report``, ``page`` | JSON, Markdown and curves; an HTML page |
| ``shapes_and_digits`` | a built-in benchmark |

Requires the extra ``eval``.
"""

from vlmkernels.evaluate.evaluation import Comparison, Evaluation, Scoring, reward_parts
from vlmkernels.evaluate.metrics import METRICS
from vlmkernels.evaluate.page import write_page
from vlmkernels.evaluate.predictions import Predictions
from vlmkernels.evaluate.report import to_json, to_markdown
from vlmkernels.evaluate.sampling import Decoding, ToolUse, predict
from vlmkernels.evaluate.tasks import HARNESSES, TASKS

__all__ = [
    "HARNESSES",
    "METRICS",
    "TASKS",
    "Comparison",
    "Decoding",
    "Evaluation",
    "Predictions",
    "Scoring",
    "ToolUse",
    "predict",
    "reward_parts",
    "to_json",
    "to_markdown",
    "write_page",
]
