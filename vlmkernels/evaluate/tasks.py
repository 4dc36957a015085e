"""The tasks: what an answer is, what it is compared with, which metrics are taken of it; and what other harnesses do."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from vlmkernels.evaluate import metrics as m
from vlmkernels.evaluate.statistics import Sums, mean_of
from vlmkernels.evaluate.vqa import people
from vlmkernels.rewards import boxes, text
from vlmkernels.rewards.answers import PARSERS, as_boxes, find_answer

COMMON = ("parse_failure_rate", "format_rate", "mean_length", "truncation_rate")


class Task(NamedTuple):
    """answer: what is read from a completion, a key of ``PARSERS``; "objects": a text that names some. right: the pure function
    that is 1 where the answer is right, None where answers are not right or wrong. metrics: by default. reference: raises
    ValueError or TypeError for a reference of the wrong type. column: of the reference."""

    answer: str
    right: Callable | None
    metrics: tuple[str, ...]
    reference: Callable[[Any], Any]
    column: str = "answer"


def _by(function: Callable, example: Any) -> Callable[[Any], Any]:
    """The check of references that a pure function makes by itself, on a prediction that is fine."""

    def check(reference: Any) -> None:
        if reference is None:
            raise TypeError("must be given, got None")
        try:
            function([example], [reference])
        except (ValueError, TypeError) as error:
            raise type(error)(str(error).removeprefix("references[0] ")) from error

    return check


def _objects(value: Any) -> None:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"must be a list of names of objects, got {value!r:.80}")


def _hit(predictions: Sequence, references: Sequence, threshold: float = 0.5, at_least: bool = True) -> list[float | None]:
    """1 where the IoU is >= 0.5 (or > it)."""
    iou = boxes.iou(predictions, references)
    return [None if v is None else float(v >= threshold if at_least else v > threshold) for v in iou]


YES_NO = ("accuracy", "precision", "recall", "f1", "yes_ratio")

TASKS: dict[str, Task] = {
    "exact": Task("text", text.exact_match, ("accuracy",), _by(text.exact_match, "")),
    "choice": Task("choice", text.choice, ("accuracy",), _by(text.choice, "A")),
    "yes_no": Task("yes_no", text.yes_no, YES_NO, _by(text.yes_no, "yes")),
    "mme": Task("yes_no", text.yes_no, ("mme_score", "mme_accuracy", "mme_accuracy_plus"), _by(text.yes_no, "yes")),
    "counting": Task("count", text.count, ("accuracy", "soft_count"), _by(text.count, 0.0)),
    "numeric": Task("number", text.numeric, ("accuracy",), _by(text.numeric, 0.0)),
    "math": Task("text", text.math_equal, ("accuracy",), _by(text.exact_match, "")),
    "chart": Task("text", text.relaxed_accuracy, ("relaxed_accuracy",), _by(text.relaxed_accuracy, "")),
    "ocr": Task("text", text.exact_match, ("exact_match", "cer", "wer"), _by(text.exact_match, "")),
    "docvqa": Task("text", None, ("anls",), _by(text.anls, "")),
    "vqa": Task("text", None, ("vqa_accuracy",), people),
    "grounding": Task("box", _hit, (), _by(boxes.iou, (0.0, 0.0, 1.0, 1.0))),
    "pointing": Task("point", boxes.point_in_box, ("accuracy",), _by(boxes.iou, (0.0, 0.0, 1.0, 1.0))),
    "detection": Task("boxes", None, ("ap", "ap50"), as_boxes),
    "open": Task("text", None, (), lambda reference: None),  # no reference: rewards and lengths alone
    "caption": Task("objects", None, ("chair_i", "chair_s"), _objects, "objects"),
}


@dataclass(frozen=True)
class Harness:
    """How a harness compares. thresholds, at_least: of IoUs in accuracies. answer: what of a completion is looked at. parsers:
    in place of those of ``vlmkernels.rewards``, by task. metrics: in place of those of ``METRICS``."""

    thresholds: tuple[float, ...]
    at_least: bool
    answer: Callable[[str], str | None]
    parsers: dict[str, Callable[[str], Any]] = field(default_factory=dict)
    metrics: dict[str, Callable] = field(default_factory=dict)

    def task_metrics(self, name: str) -> tuple[str, ...]:
        accuracies = tuple(f"acc@{t:g}" for t in self.thresholds) if name == "grounding" else ()
        return (*TASKS[name].metrics, *accuracies, *(("miou",) if accuracies else ()))

    def parse(self, task: str, completion: str) -> Any:
        """What a completion answers, None where that cannot be read."""
        answer = self.answer(completion)
        parser = self.parsers.get(task) or PARSERS.get(TASKS[task].answer, str)
        return None if answer is None else parser(answer)

    def right(self, task: str) -> Callable | None:
        return partial(_hit, at_least=self.at_least) if task == "grounding" else TASKS[task].right

    def metric(self, name: str) -> m.Metric:
        found = m.metric(name, self.at_least)
        return replace(found, statistic=self.metrics.get(name, found.statistic))


_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_LIST = re.compile(rf"\[{','.join([_NUMBER] * 4)}\]")


def _first_list(answer: str) -> tuple[float, ...] | None:
    """The first four numbers in square brackets; a box that others follow counts, as does one without area (IoU 0)."""
    match = _LIST.search(answer)
    return tuple(map(float, match.groups())) if match else None


def _first_element(completion: str) -> str | None:
    match = re.search(r"<answer>(.*?)</answer>", completion, re.DOTALL)
    return match[1].strip() if match else None


def _whole_word(answer: str) -> str | None:
    answer = answer.lower().strip()
    return answer if answer in ("yes", "no") else None


def _beginning(answer: str) -> str | None:
    """Yes or no by a completion's first four characters, or its one letter."""
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
    """What ``float`` takes is a number, and a reference of 0 is compared as text."""
    ours, theirs = _float(prediction), _float(reference)
    if ours is not None and theirs:
        return abs(ours - theirs) / abs(theirs) <= 0.05
    return prediction.lower() == reference.lower()


def _several(reference: Any) -> list[str]:
    return [str(r) for r in reference] if isinstance(reference, (list, tuple)) else [str(reference)]


def _relaxed_accuracy(answers: m.Answers) -> Sums:
    value = lambda p, r: p is not None and any(_relaxed_float(p, one) for one in _several(r))  # noqa: E731
    rows = [float(value(p, r)) for p, r in zip(*answers.pairs(), strict=True)]
    return mean_of(np.array(rows).reshape(answers.shape))


def _anls(collapsed_length: bool, answers: m.Answers) -> Sums:
    """White space is collapsed before the distance is taken, and (VLMEvalKit) before the length is, or not (lmms-eval)."""
    from rapidfuzz.distance import Levenshtein

    def one(prediction: str, reference: str) -> float:
        ours, theirs = (" ".join(value.lower().split()) for value in (prediction, reference))
        length = max(map(len, (ours, theirs) if collapsed_length else (prediction, reference)))
        return 1 - (Levenshtein.distance(ours, theirs) / length if length else 0.0)

    best = [max(one(p or "", r) for r in _several(several)) for p, several in zip(*answers.pairs(), strict=True)]
    return mean_of(np.array([value if value >= 0.5 else 0.0 for value in best]).reshape(answers.shape))


def _recall_of_parsed(t: np.ndarray) -> np.ndarray:
    return t[:, 0] / (t[:, 0] + t[:, 2])


def _f1_of_parsed(t: np.ndarray) -> np.ndarray:
    return 2 * t[:, 0] / (2 * t[:, 0] + t[:, 1] + t[:, 2])


def _yes_ratio_of_references(t: np.ndarray) -> np.ndarray:
    return t[:, [0, 2, 4]].sum(1) / t.sum(1)


HARNESSES: dict[str, Harness] = {
    "vlmkernels": Harness((0.5, 0.75, 0.9), True, find_answer),
    # 0.7.3. The yes-ratio is that of the references, and unparsed answers are left out of recall and F1.
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
    # src/eval/test_rec_r1.py: the box in the answer element, which must overlap by more than one half.
    "vlm-r1": Harness((0.5,), False, _first_element, {"grounding": _first_list}),
}
