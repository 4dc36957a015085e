"""Measuring a model's answers: metrics with intervals, one definition of them for training and evaluation.

    predictions = predict(model, processor, dataset, Decoding(num_generations=8, temperature=1.0), "predictions.jsonl")
    evaluation = Evaluation(predictions, dataset, Scoring(match="lmms-eval"))
    evaluation.value("grounding", "acc@0.5"), to_markdown(evaluation), to_json(evaluation)

| module | what it holds |
| --- | --- |
| ``predictions`` | completions, sampled or saved; a killed run goes on where it stopped |
| ``tasks`` | what an answer is and what it is compared with, by task; what other harnesses do |
| ``metrics``, ``vqa``, ``coco`` | the metrics by name |
| ``statistics`` | bootstrap intervals, paired comparisons, pass@k, maj@k |
| ``evaluation`` | all of it for a dataset, in groups |
| ``report``, ``page`` | JSON, Markdown, curves; one HTML page |
| ``shapes_and_digits`` | a benchmark that is built in |

Needs the extra ``eval``.
"""

from vlmkernels.evaluate.evaluation import Evaluation, Scoring, reward_parts
from vlmkernels.evaluate.metrics import METRICS
from vlmkernels.evaluate.page import write_page
from vlmkernels.evaluate.predictions import Decoding, Predictions, predict
from vlmkernels.evaluate.report import to_json, to_markdown
from vlmkernels.evaluate.tasks import HARNESSES, TASKS

__all__ = [
    "HARNESSES",
    "METRICS",
    "TASKS",
    "Decoding",
    "Evaluation",
    "Predictions",
    "Scoring",
    "predict",
    "reward_parts",
    "to_json",
    "to_markdown",
    "write_page",
]
