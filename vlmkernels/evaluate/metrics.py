"""The metrics: a name, and what of each completion goes into it. Single answers are scored by ``vlmkernels.rewards``."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from vlmkernels.evaluate.coco import CocoAP
from vlmkernels.evaluate.statistics import Statistic, Sums, majority_at_k, mean_of, pass_at_k
from vlmkernels.evaluate.vqa import vqa_accuracy
from vlmkernels.rewards import boxes, text
from vlmkernels.rewards.answers import as_boxes, has_format
from vlmkernels.rewards.hallucination import mentions


@dataclass(frozen=True)
class Answers:
    """G completions of each of N samples of one task.

    indices: of the samples in the dataset. texts: the completions. values: what was parsed from each, None where nothing could
    be. references, rows: of the dataset, rows without images. prompts: as text. correct: (N, G) of 0 and 1, None where the
    task's answers are not right or wrong. lengths, truncated: (N, G), NaN where it is not known. rewards: (N, G) by name, NaN =
    not scored. vocabulary: names of objects, for CHAIR.
    """

    indices: list[int]
    texts: list[list[str]]
    values: list[list[Any]]
    references: list[Any]
    rows: list[dict]
    prompts: list[str]
    lengths: np.ndarray
    truncated: np.ndarray
    correct: np.ndarray | None = None
    rewards: dict[str, np.ndarray] = field(default_factory=dict)
    vocabulary: Any = None

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.texts), len(self.texts[0])

    def pairs(self) -> tuple[list, list]:
        """Parsed answers and their references, (N * G,) each."""
        return [v for values in self.values for v in values], [r for r in self.references for _ in range(self.shape[1])]


def score(function: Callable, answers: Answers, **options) -> np.ndarray:
    """(N, G) of a pure function of ``vlmkernels.rewards``; an answer that could not be parsed scores 0."""
    scores = function(*answers.pairs(), **options)
    return np.array([0.0 if value is None else value for value in scores]).reshape(answers.shape)


def _ratio(total: np.ndarray) -> np.ndarray:
    return total[:, 0] / total[:, 1]


def _sums(answers: Answers, statistic: Callable[[Any, Any], Sequence[float]], finish=_ratio) -> Sums:
    """``statistic(parsed answer, reference)`` of each completion, of which ``finish`` takes the totals."""
    rows = [statistic(value, reference) for value, reference in zip(*answers.pairs(), strict=True)]
    return Sums(np.array(rows, dtype=np.float64).reshape(*answers.shape, -1), finish)


def _mean(function: Callable, **options) -> Callable[[Answers], Statistic]:
    return lambda answers: mean_of(score(function, answers, **options))


# Boxes


def _iou(answers: Answers) -> np.ndarray:
    return score(boxes.iou, answers)


def accuracy_at(threshold: float, at_least: bool, answers: Answers) -> Sums:
    """The share of boxes whose IoU is >= the threshold, or > it."""
    iou = _iou(answers)
    return mean_of((iou >= threshold if at_least else iou > threshold).astype(float))


def average_precision(threshold: float | None, answers: Answers) -> Statistic:
    return CocoAP(answers.values, [as_boxes(reference) for reference in answers.references], threshold)


# Text


def _error_rate(split: Callable[[str], Sequence], answers: Answers) -> Sums:
    """Edit distance over the reference's length, both summed over samples, not clipped; no answer counts as an empty one. Of
    several references, the one with the least share of errors."""
    from rapidfuzz.distance import Levenshtein

    def statistic(value: str | None, reference: Any) -> tuple[int, int]:
        ours = split((value or "").strip())
        several = [split(str(r).strip()) for r in (reference if isinstance(reference, (list, tuple)) else [reference])]
        return min(((Levenshtein.distance(ours, r), len(r)) for r in several), key=lambda pair: pair[0] / max(pair[1], 1))

    return _sums(answers, statistic)


def _vqa(answers: Answers) -> Sums:
    return _sums(answers, lambda value, reference: (0.0 if value is None else vqa_accuracy(value, reference), 1))


# Yes or no, as POPE (2305.10355) counts. Totals: true, false positives; false, true negatives; unparsed of "yes", of "no".


def confusion(value: str | None, reference: Any) -> list[bool]:
    yes = text.yes_no(["yes"], [reference])[0] == 1.0
    return [value == answer and yes == truth for answer, truth in (("yes", 1), ("yes", 0), ("no", 1), ("no", 0))] + [
        value is None and yes == truth for truth in (True, False)
    ]


def _precision(t: np.ndarray) -> np.ndarray:
    return t[:, 0] / (t[:, 0] + t[:, 1])


def _recall(t: np.ndarray) -> np.ndarray:
    """Of all that is there; an answer that could not be parsed did not find it."""
    return t[:, 0] / (t[:, 0] + t[:, 2] + t[:, 4])


def _f1(t: np.ndarray) -> np.ndarray:
    return 2 * t[:, 0] / (2 * t[:, 0] + t[:, 1] + t[:, 2] + t[:, 4])


def _yes_ratio(t: np.ndarray) -> np.ndarray:
    return (t[:, 0] + t[:, 1]) / t.sum(1)


def pope(finish: Callable[[np.ndarray], np.ndarray]) -> Callable[[Answers], Sums]:
    return lambda answers: _sums(answers, confusion, finish)


# MME: questions come in pairs about one image, "yes" and "no"; a sample of its statistics is a pair.


class _Pair(NamedTuple):
    right: np.ndarray  # (2, G)
    category: str


def _pairs(answers: Answers) -> list[_Pair]:
    groups: dict[Any, list[int]] = {}
    for place, row in enumerate(answers.rows):
        if row.get("question_id") is None:
            raise ValueError(
                f"sample {answers.indices[place]} must have a column 'question_id', one value per pair of questions"
            )
        groups.setdefault((row.get("category"), row["question_id"]), []).append(place)
    right = score(text.yes_no, answers)
    for (_, name), places in groups.items():
        if len(places) != 2:
            where = ", ".join(str(answers.indices[place]) for place in places)
            raise ValueError(f"question_id {name!r} must occur twice within its category, got {len(places)} (samples {where})")
    return [_Pair(right[places], str(category)) for (category, _), places in groups.items()]


def _mme(answers: Answers, single: float, both: float, per_category: bool) -> Sums:
    """``single`` times the accuracy plus ``both`` times the share of pairs with both right, of each category or of all."""
    pairs = _pairs(answers)
    names = sorted({pair.category for pair in pairs}) if per_category else [None]
    statistics = np.zeros((len(pairs), answers.shape[1], 2 * len(names)))
    for row, pair in zip(statistics, pairs, strict=True):
        place = names.index(pair.category) if per_category else 0
        row[:, 2 * place] = single * pair.right.mean(0) + both * pair.right.all(0)
        row[:, 2 * place + 1] = 1
    return Sums(statistics, lambda total: np.nansum(total[:, ::2] / total[:, 1::2], axis=1))


# Captions


def _chair(per_caption: bool, answers: Answers) -> Sums:
    """CHAIR (1809.02156): the share of objects named that are not there; of captions that name one that is not there."""
    captions, shown = answers.pairs()
    found = mentions([caption or "" for caption in captions], shown, answers.vocabulary)
    rows = [(bool(f.hallucinated), 1) if per_caption else (len(f.hallucinated), len(f.mentioned)) for f in found]
    return Sums(np.array(rows, dtype=np.float64).reshape(*answers.shape, 2), _ratio)


# Whatever the task


def _format(answers: Answers) -> Sums:
    rows = zip(answers.texts, answers.prompts, strict=True)
    return mean_of(np.array([[float(has_format(completion, prompt)) for completion in group] for group, prompt in rows]))


def _parse_failures(answers: Answers) -> Sums:
    return mean_of(np.array([[float(value is None) for value in values] for values in answers.values]))


def _pass(k: int, answers: Answers) -> Sums:
    return mean_of(pass_at_k(answers.correct, k)[:, None])


def _majority(k: int, answers: Answers) -> Sums:
    values = [[_hashable(value) for value in group] for group in answers.values]
    return mean_of(majority_at_k(values, answers.correct, k)[:, None])


def _hashable(value):
    return value.casefold().strip() if isinstance(value, str) else value


@dataclass(frozen=True)
class Metric:
    """statistic: of the answers. kind: of the answers that it takes, or their task; "" = any, "right" = those that are right
    or wrong. sign: +1 where more is better, -1 where less is, 0 where neither. share: shown in percent."""

    statistic: Callable[[Answers], Statistic]
    kind: str
    doc: str
    sign: int = 1
    share: bool = True


METRICS: dict[str, Metric] = {
    "exact_match": Metric(_mean(text.exact_match), "text", "the answer is the reference, letter by letter"),
    "accuracy": Metric(lambda answers: mean_of(answers.correct), "right", "the answer is right"),
    "soft_count": Metric(_mean(text.count, soft=True), "count", "1 - |count - reference| / reference, at least 0"),
    "relaxed_accuracy": Metric(_mean(text.relaxed_accuracy), "text", "numbers within 5 %, texts equal (ChartQA)"),
    "anls": Metric(_mean(text.anls), "text", "average normalised Levenshtein similarity, 0 below 0.5"),
    "cer": Metric(partial(_error_rate, str), "text", "character error rate over all samples", -1),
    "wer": Metric(partial(_error_rate, str.split), "text", "word error rate over all samples", -1),
    "vqa_accuracy": Metric(_vqa, "vqa", "agreement with people (VQAv2)"),
    "precision": Metric(pope(_precision), "yes_no", "of the answers yes, those that are right"),
    "recall": Metric(pope(_recall), "yes_no", "of what is there, what was found"),
    "f1": Metric(pope(_f1), "yes_no", "harmonic mean of precision and recall"),
    "yes_ratio": Metric(pope(_yes_ratio), "yes_no", "the share of answers that are yes", 0),
    "mme_accuracy": Metric(partial(_mme, single=1, both=0, per_category=False), "mme", "questions answered right"),
    "mme_accuracy_plus": Metric(partial(_mme, single=0, both=1, per_category=False), "mme", "images with both questions right"),
    "mme_score": Metric(
        partial(_mme, single=100, both=100, per_category=True),
        "mme",
        "100 (accuracy + accuracy plus), summed over categories",
        share=False,
    ),
    "miou": Metric(lambda answers: mean_of(_iou(answers)), "box", "mean IoU; 0 where no box could be read"),
    "ap": Metric(partial(average_precision, None), "boxes", "COCO's AP, IoU 0.50 to 0.95"),
    "ap50": Metric(partial(average_precision, 0.5), "boxes", "COCO's AP at IoU 0.50"),
    "chair_i": Metric(partial(_chair, False), "objects", "objects named that are not there", -1),
    "chair_s": Metric(partial(_chair, True), "objects", "captions that name an object that is not there", -1),
    "format_rate": Metric(_format, "", "<think>...</think><answer>...</answer>, each once"),
    "parse_failure_rate": Metric(_parse_failures, "", "no answer could be read", -1),
    "mean_length": Metric(lambda answers: mean_of(answers.lengths), "", "tokens of a completion", 0, share=False),
    "truncation_rate": Metric(lambda answers: mean_of(answers.truncated), "", "cut off at the greatest length", -1),
}
# Metrics with a number in their name.
NUMBERED = {"acc@": ("IoU", float), "pass@": ("completions", int), "maj@": ("completions", int)}
REWARD = "rewards/"


def names() -> str:
    """What a metric may be called, for messages."""
    return ", ".join([*METRICS, *(f"{prefix}<{what}>" for prefix, (what, _) in NUMBERED.items())])


def metric(name: str, iou_at_least: bool = True) -> Metric:
    """The metric of a name. ValueError, which lists the valid ones, for any other."""
    if name in METRICS:
        return METRICS[name]
    if name.startswith(REWARD):
        reward = name.removeprefix(REWARD)
        return Metric(lambda answers: mean_of(answers.rewards[reward]), "", f"mean of the reward {reward}", share=False)
    for prefix, (_, kind) in NUMBERED.items():
        try:
            number = kind(name.removeprefix(prefix)) if name.startswith(prefix) else 0
        except ValueError:
            number = 0
        if number <= 0:
            continue
        if prefix == "acc@" and number < 1:
            sign = ">=" if iou_at_least else ">"
            return Metric(partial(accuracy_at, number, iou_at_least), "box", f"boxes with an IoU {sign} {number:g}")
        if prefix == "pass@":
            return Metric(partial(_pass, number), "right", f"one of {number} completions is right, unbiased")
        if prefix == "maj@":
            return Metric(partial(_majority, number), "right", f"the most frequent answer of {number} completions is right")
    near = difflib.get_close_matches(name, METRICS, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ValueError(f"metric must be one of {names()}, got {name!r}{hint}")
