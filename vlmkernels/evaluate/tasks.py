"""Tasks, with their kinds of answers, references and metrics, and the differences of other evaluation harnesses."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from vlmkernels.evaluate import metrics as m
from vlmkernels.evaluate.statistics import Sums, mean_of
from vlmkernels.evaluate.vqa import human_answers
from vlmkernels.rewards import boxes, text
from vlmkernels.rewards.answers import PARSERS, as_boxes, find_answer

COMMON = ("parse_failure_rate", "format_rate", "mean_length", "truncation_rate")


class Task(NamedTuple):
    """A task.

    Attributes:
        answer: the kind of answer, a key of ``PARSERS``, or "objects" for a text that names objects.
        grade: the function of ``vlmkernels.rewards`` that returns 1 for a correct answer. None if answers are not graded as
            correct or wrong.
        metrics: metrics that are reported by default.
        check_reference: raises ValueError or TypeError for an invalid reference.
        column: the column of the dataset with the references.
    """

    answer: str
    grade: Callable | None
    metrics: tuple[str, ...]
    check_reference: Callable[[Any], Any]
    column: str = "answer"


def _checked_by(function: Callable, example: Any) -> Callable[[Any], Any]:
    """Return a check of references that calls a scoring function with a valid prediction."""

    def check(reference: Any) -> None:
        if reference is None:
            raise TypeError("must be given, got None")
        try:
            function([example], [reference])
        except (ValueError, TypeError) as error:
            raise type(error)(str(error).removeprefix("references[0] ")) from error

    return check


def _check_objects(value: Any) -> None:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"must be a list of names of objects, got {value!r:.80}")


def _hit(predictions: Sequence, references: Sequence, inclusive: bool = True) -> list[float | None]:
    """Return 1 for boxes with IoU >= 0.5, or > 0.5 if not ``inclusive``."""
    iou = boxes.iou(predictions, references)
    return [None if v is None else float(v >= 0.5 if inclusive else v > 0.5) for v in iou]


YES_NO = ("accuracy", "precision", "recall", "f1", "yes_ratio")

TASKS: dict[str, Task] = {
    "exact": Task("text", text.exact_match, ("accuracy",), _checked_by(text.exact_match, "")),
    "choice": Task("choice", text.choice, ("accuracy",), _checked_by(text.choice, "A")),
    "yes_no": Task("yes_no", text.yes_no, YES_NO, _checked_by(text.yes_no, "yes")),
    "mme": Task("yes_no", text.yes_no, ("mme_score", "mme_accuracy", "mme_accuracy_plus"), _checked_by(text.yes_no, "yes")),
    "counting": Task("count", text.count, ("accuracy", "soft_count"), _checked_by(text.count, 0.0)),
    "numeric": Task("number", text.numeric, ("accuracy",), _checked_by(text.numeric, 0.0)),
    "math": Task("text", text.math_equal, ("accuracy",), _checked_by(text.exact_match, "")),
    "chart": Task("text", text.relaxed_accuracy, ("relaxed_accuracy",), _checked_by(text.relaxed_accuracy, "")),
    "ocr": Task("text", text.exact_match, ("exact_match", "cer", "wer"), _checked_by(text.exact_match, "")),
    "docvqa": Task("text", None, ("anls",), _checked_by(text.anls, "")),
    "vqa": Task("text", None, ("vqa_accuracy",), human_answers),
    "grounding": Task("box", _hit, (), _checked_by(boxes.iou, (0.0, 0.0, 1.0, 1.0))),
    "pointing": Task("point", boxes.point_in_box, ("accuracy",), _checked_by(boxes.iou, (0.0, 0.0, 1.0, 1.0))),
    "detection": Task("boxes", None, ("ap", "ap50"), as_boxes),
    "open": Task("text", None, (), lambda reference: None),  # no reference: rewards and lengths only
    "caption": Task("objects", None, ("chair_i", "chair_s"), _check_objects, "objects"),
}


@dataclass(frozen=True)
class Harness:
    """How an evaluation harness compares answers.

    Args:
        thresholds: IoU thresholds of the accuracies acc@t.
        inclusive: whether acc@t counts boxes with an IoU of exactly t.
        answer: returns the answer in a completion, or None if there is none.
        parsers: parsers by task that replace those of ``vlmkernels.rewards``.
        metrics: functions by name of the metric that replace its ``statistic`` in ``METRICS``.
    """

    thresholds: tuple[float, ...]
    inclusive: bool
    answer: Callable[[str], str | None]
    parsers: dict[str, Callable[[str], Any]] = field(default_factory=dict)
    metrics: dict[str, Callable] = field(default_factory=dict)

    def task_metrics(self, name: str) -> tuple[str, ...]:
        """Return the names of the metrics that are reported for a task."""
        accuracies = tuple(f"acc@{t:g}" for t in self.thresholds) if name == "grounding" else ()
        return (*TASKS[name].metrics, *accuracies, *(("miou",) if accuracies else ()))

    def parse(self, task: str, completion: str) -> Any:
        """Parse the answer of a completion. Return None if that fails."""
        answer = self.answer(completion)
        parser = self.parsers.get(task) or PARSERS.get(TASKS[task].answer, str)
        return None if answer is None else parser(answer)

    def grade(self, task: str) -> Callable | None:
        """Return the function that grades the answers of a task; see ``Task.grade``."""
        return partial(_hit, inclusive=self.inclusive) if task == "grounding" else TASKS[task].grade

    def metric(self, name: str) -> m.Metric:
        """Return the metric with a name as this harness computes it."""
        found = m.metric(name, self.inclusive)
        return replace(found, statistic=self.metrics.get(name, found.statistic))


_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_LIST = re.compile(rf"\[{','.join([_NUMBER] * 4)}\]")


def _first_list(answer: str) -> tuple[float, ...] | None:
    """Parse the first four numbers in square brackets. More boxes may follow, and a box without area has IoU 0."""
    match = _LIST.search(answer)
    return tuple(map(float, match.groups())) if match else None


def _first_element(completion: str) -> str | None:
    match = re.search(r"<answer>(.*?)</answer>", completion, re.DOTALL)
    return match[1].strip() if match else None


def _whole_word(answer: str) -> str | None:
    answer = answer.lower().strip()
    return answer if answer in ("yes", "no") else None


def _beginning(answer: str) -> str | None:
    """Parse yes or no from the first four characters, or from a single letter."""
    answer = answer.lower().strip().replace(".", "")
    if len(answer) == 1:
        return {"y": "yes", "n": "no"}.get(answer)
    return next((word for word in ("yes", "no") if word in answer[:4]), None)


def _float(value: str) -> float | None:
    try:
        return float(value.rstrip("%")) / 100 if value.endswith("%") else float(value)
    except ValueError:
        return None


def _relaxed_float(prediction: str, reference: str) -> bool:
    """Compare numbers that ``float`` parses within 5 %; other values and a reference of 0 as text."""
    ours, theirs = _float(prediction), _float(reference)
    if ours is not None and theirs:
        return abs(ours - theirs) / abs(theirs) <= 0.05
    return prediction.lower() == reference.lower()


def _as_texts(reference: Any) -> list[str]:
    return [str(r) for r in reference] if isinstance(reference, (list, tuple)) else [str(reference)]


def _relaxed_accuracy(answers: m.Answers) -> Sums:
    pairs = zip(*answers.pairs(), strict=True)
    rows = [float(p is not None and any(_relaxed_float(p, one) for one in _as_texts(r))) for p, r in pairs]
    return mean_of(np.array(rows).reshape(answers.shape))


def _anls(collapsed_length: bool, answers: m.Answers) -> Sums:
    """Collapse white space before the distance is computed, and (VLMEvalKit, but not lmms-eval) also before the length is."""
    from rapidfuzz.distance import Levenshtein

    def one(prediction: str, reference: str) -> float:
        ours, theirs = (" ".join(value.lower().split()) for value in (prediction, reference))
        length = max(map(len, (ours, theirs) if collapsed_length else (prediction, reference)))
        return 1 - (Levenshtein.distance(ours, theirs) / length if length else 0.0)

    best = [max(one(p or "", r) for r in _as_texts(references)) for p, references in zip(*answers.pairs(), strict=True)]
    return mean_of(np.array([value if value >= 0.5 else 0.0 for value in best]).reshape(answers.shape))


def _recall_of_parsed(t: np.ndarray) -> np.ndarray:
    return t[:, 0] / (t[:, 0] + t[:, 2])


def _f1_of_parsed(t: np.ndarray) -> np.ndarray:
    return 2 * t[:, 0] / (2 * t[:, 0] + t[:, 1] + t[:, 2])


def _yes_ratio_of_references(t: np.ndarray) -> np.ndarray:
    return t[:, [0, 2, 4]].sum(1) / t.sum(1)


HARNESSES: dict[str, Harness] = {
    "vlmkernels": Harness((0.5, 0.75, 0.9), True, find_answer),
    # Version 0.7.3. The yes-ratio is that of the references, and recall and F1 ignore answers that could not be parsed.
    "lmms-eval": Harness(
        (0.1, 0.3, 0.5, 0.7, 0.9),
        True,
        str,
        {"yes_no": _whole_word, "mme": _beginning, "grounding": _first_list},
        {
            "relaxed_accuracy": _relaxed_accuracy,
            "anls": partial(_anls, False),
            "recall": m.pope(_recall_of_parsed),
            "f1": m.pope(_f1_of_parsed),
            "yes_ratio": m.pope(_yes_ratio_of_references),
        },
    ),
    "vlmevalkit": Harness(
        (0.5,),
        True,
        str.strip,
        {"grounding": _first_list},
        {"relaxed_accuracy": _relaxed_accuracy, "anls": partial(_anls, True)},
    ),
    # src/eval/test_rec_r1.py: the box in the answer element must have an IoU of more than 0.5.
    "vlm-r1": Harness((0.5,), False, _first_element, {"grounding": _first_list}),
}
