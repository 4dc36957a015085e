"""Tasks, with their kinds of answers, references and metrics, and the differences of other evaluation harnesses."""

import math
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from vlmkernels.evaluate import harness_boxes as b
from vlmkernels.evaluate import harness_text as t
from vlmkernels.evaluate import metrics as m
from vlmkernels.evaluate.statistics import mean_of
from vlmkernels.evaluate.vqa import PERIODS_APART, human_answers, normalize, vqa_accuracy
from vlmkernels.rewards import boxes, text
from vlmkernels.rewards.answers import PARSERS, as_boxes, find_answer, parse_choice

COMMON = ("parse_failure_rate", "format_rate", "mean_length", "truncation_rate", *m.TURNS)


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


def _hit(predictions: Sequence, references: Sequence, inclusive: bool = True, iou: Callable = boxes.iou) -> list[float | None]:
    """Return 1 for boxes with IoU >= 0.5, or > 0.5 if not ``inclusive``."""
    ious = iou(predictions, references)
    return [None if v is None else float(v >= 0.5 if inclusive else v > 0.5) for v in ious]


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


class Rule(NamedTuple):
    """How a harness reads and scores the answers of a task.

    Attributes:
        source: the file of the harness, and what in it.
        parse: returns the answer in a text, or None if there is none.
        metrics: metrics that are reported, by name; the function replaces the ``statistic`` in ``METRICS`` if it is not None.
        score: returns the score of an answer and a reference. None: the task's ``grade``.
        options: whether ``parse`` also takes the texts of the options by letter.
        letters: letters of the options that a reference can be; empty for other answers.
        to_pixels: converts a box to pixels, given the image's width and height, or None if there is no image. None: the box is
            converted from the frame of the evaluation.
    """

    source: str
    parse: Callable[..., Any]
    metrics: dict[str, Callable | None]
    score: Callable[[Any, Any], float] | None = None
    options: bool = False
    letters: tuple[str, ...] = ()
    to_pixels: Callable[[Any, tuple[int, int] | None], Any] | None = None


def scored(source: str, parse: Callable[[str], Any], metric: str, score: Callable[[Any, Any], float]) -> Rule:
    """Return a rule whose metric is the mean of a score."""
    return Rule(source, parse, {metric: lambda answers: mean_of(m.scores_of(_each(score), answers))}, score)


def _each(score: Callable[[Any, Any], float]) -> Callable[[Sequence, Sequence], list[float | None]]:
    """Return a function that scores lists of answers. An answer that could not be parsed has no score."""
    return lambda answers, references: [None if a is None else score(a, r) for a, r in zip(answers, references, strict=True)]


@dataclass(frozen=True)
class Harness:
    """How an evaluation harness compares answers.

    Args:
        thresholds: IoU thresholds of the accuracies acc@t.
        inclusive: whether acc@t counts boxes with an IoU of exactly t.
        answer: returns the answer in a completion, or None if there is none.
        rules: rules by task. Other tasks cannot be compared as in this harness. Empty: the definitions in ``TASKS``.
        iou: the scoring function of boxes.
    """

    thresholds: tuple[float, ...]
    inclusive: bool
    answer: Callable[[str], str | None]
    rules: dict[str, Rule] = field(default_factory=dict)
    iou: Callable = boxes.iou

    @property
    def slack(self) -> float:
        """How far boxes and points may lie outside their frame; see ``to_frame``. Other harnesses have no limit."""
        return math.inf if self.rules else 0.01

    def check(self, task: str, row: dict) -> None:
        """Raise ValueError if the harness cannot compare the answers of a row."""
        if not self.rules or task == "open":
            return
        if task not in self.rules:
            raise ValueError(f"task must be one of {', '.join(self.rules)}, got {task!r}")
        rule, reference = self.rules[task], row.get(TASKS[task].column)
        if rule.options and len(_options(row)) < 2:
            raise ValueError(f"dataset must have the texts of the options in columns 'A', 'B', ..., got {', '.join(row)}")
        if rule.letters and parse_choice(str(reference)) not in (*rule.letters, None):
            raise ValueError(f"answer must be one of {', '.join(rule.letters)}, got {reference!r}")

    def task_metrics(self, name: str) -> tuple[str, ...]:
        """Return the names of the metrics that are reported for a task."""
        accuracies = tuple(f"acc@{t:g}" for t in self.thresholds) if name == "grounding" else ()
        own = self.rules[name].metrics if name in self.rules else TASKS[name].metrics
        return (*own, *accuracies, *(("miou",) if accuracies else ()))

    def parse(self, task: str, completion: str, row: dict | None = None) -> Any:
        """Parse the answer of a completion. Return None if that fails.

        Args:
            task: a key of ``TASKS``.
            completion: the text.
            row: the row of the sample, for rules that need the options.
        """
        answer = self.answer(completion)
        if answer is None:
            return None
        if task not in self.rules:
            return PARSERS.get(TASKS[task].answer, str)(answer)
        rule = self.rules[task]
        return rule.parse(answer, _options(row or {})) if rule.options else rule.parse(answer)

    def grade(self, task: str) -> Callable | None:
        """Return the function that grades the answers of a task; see ``Task.grade``."""
        if TASKS[task].grade is not None and task in self.rules and self.rules[task].score is not None:
            return _each(self.rules[task].score)
        return partial(_hit, inclusive=self.inclusive, iou=self.iou) if task == "grounding" else TASKS[task].grade

    def metric(self, name: str) -> m.Metric:
        """Return the metric with a name as this harness computes it.

        Raises:
            ValueError: there is no such metric, or the harness does not have it.
        """
        found = m.metric(name, self.inclusive, self.iou)
        if not self.rules or found.kind in ("", "graded", "box"):
            return found
        own = {metric: statistic for rule in self.rules.values() for metric, statistic in rule.metrics.items()}
        if name not in own:
            reported = dict.fromkeys(metric for task in self.rules for metric in self.task_metrics(task))
            raise ValueError(f"metric must be one of this harness ({', '.join(reported)}), got {name!r}")
        return replace(found, statistic=own[name] or found.statistic)


def _options(row: dict) -> dict[str, str]:
    """Return the texts of the options by letter."""
    return {letter: str(row[letter]) for letter in string.ascii_uppercase if row.get(letter) not in (None, "")}


def _first_element(completion: str) -> str | None:
    match = re.search(r"<answer>(.*?)</answer>", completion, re.DOTALL)
    return match[1].strip() if match else None


# Metrics of yes and no: no answer "yes" is a precision of 0.


def _or_zero(finish: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda total: np.nan_to_num(finish(total))


def _recall_of_parsed(total: np.ndarray) -> np.ndarray:
    return total[:, 0] / (total[:, 0] + total[:, 2])


def _f1_of_parsed(total: np.ndarray) -> np.ndarray:
    return 2 * total[:, 0] / (2 * total[:, 0] + total[:, 1] + total[:, 2])


def _yes_ratio_of_references(total: np.ndarray) -> np.ndarray:
    return total[:, [0, 2, 4]].sum(1) / total.sum(1)


def _yes_no(**finish: Callable[[np.ndarray], np.ndarray]) -> dict[str, Callable | None]:
    return {"accuracy": None, **{name: m.pope(_or_zero(function)) for name, function in finish.items()}}


_MME: dict[str, Callable | None] = dict.fromkeys(TASKS["mme"].metrics)
_LMMS_VQA = partial(normalize, comma=re.compile(r"\d,+\d"))
_VLMEVALKIT_VQA = partial(normalize, periods=PERIODS_APART)

# Version 0.7.3. The yes-ratio is that of the references, and recall and F1 ignore answers that could not be parsed.
LMMS_EVAL = {
    "exact": Rule("tasks/gqa/gqa.yaml", str, {"accuracy": None}, t.best(t.equal_without_punctuation)),
    "choice": Rule("tasks/mmstar/utils.py", t.letter_by_format, {"accuracy": None}, letters=t.LETTERS),
    "yes_no": Rule(
        "tasks/pope/utils.py",
        t.whole_word,
        _yes_no(precision=m.precision, recall=_recall_of_parsed, f1=_f1_of_parsed, yes_ratio=_yes_ratio_of_references),
    ),
    "mme": Rule("tasks/mme/utils.py", t.beginning, _MME),
    "counting": Rule("tasks/countbench/utils.py", t.digits, {"accuracy": None}, t.equal_digits),
    "chart": scored("tasks/chartqa/utils.py", str, "relaxed_accuracy", t.best(t.relaxed)),
    "docvqa": scored("api/metrics.py: anls", str, "anls", t.best(t.anls)),
    "vqa": scored("tasks/vqav2/utils.py", str, "vqa_accuracy", partial(vqa_accuracy, normalize=_LMMS_VQA)),
    "grounding": Rule("tasks/refcoco/utils_rec.py", b.first_list, {}),
}
# Commit e8e78f0, with the judge ``exact_matching``.
VLMEVALKIT = {
    "exact": Rule("utils/vqa_eval.py: accuracy", str, {"accuracy": None}, t.best(t.equal_stripped, t.texts_or_literal)),
    "choice": Rule("utils/multiple_choice.py", t.letter_or_option, {"accuracy": None}, options=True),
    "yes_no": Rule("utils/yorn.py: POPE_rating", t.only_word, _yes_no(precision=m.precision, recall=m.recall, f1=m.f1)),
    "mme": Rule("utils/yorn.py: MME_rating", t.only_word, _MME),
    "counting": Rule("image_vqa.py: CountBenchQA", str, {"accuracy": None}, t.contains_digits),
    "chart": scored(
        "utils/vqa_eval.py: relaxed_accuracy", str.strip, "relaxed_accuracy", t.best(t.relaxed, t.texts_or_literal)
    ),
    "docvqa": scored("utils/vqa_eval.py: anls", str, "anls", t.best(t.anls, t.texts_or_literal)),
    "vqa": scored("utils/vqa_eval.py: vqa_score", str, "vqa_accuracy", partial(vqa_accuracy, normalize=_VLMEVALKIT_VQA)),
    "grounding": Rule("refcoco.py", b.first_numbers, {}, to_pixels=b.pixels_by_magnitude),
}
# The box in the answer element must have an IoU of more than 0.5.
VLM_R1 = {"grounding": Rule("src/eval/test_rec_r1.py", b.last_list_in_braces, {})}

HARNESSES: dict[str, Harness] = {
    "vlmkernels": Harness((0.5, 0.75, 0.9), True, find_answer),
    "lmms-eval": Harness((0.1, 0.3, 0.5, 0.7, 0.9), True, t.without_reasoning, LMMS_EVAL),
    "vlmevalkit": Harness((0.5,), True, str, VLMEVALKIT),
    "vlm-r1": Harness((0.5,), False, _first_element, VLM_R1, b.iou_of_pixels),
}
