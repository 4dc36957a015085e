"""The metrics by name. The functions of ``vlmkernels.rewards`` score single answers; a metric combines their scores."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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

    Args:
        indices: indices of the samples in the dataset.
        texts: the completions.
        values: the answer parsed from each completion; None if it could not be parsed.
        references: the reference answer of each sample.
        rows: the row of each sample, without images.
        prompts: the prompts as text.
        lengths: (N, G) number of tokens of each completion; NaN if unknown.
        truncated: (N, G) 1 if a completion was truncated, else 0; NaN if unknown.
        turns: (N, G, 3) numbers of turns, tool calls and failed calls of each completion, as in ``TURNS``; NaN if unknown.
        correct: (N, G) 1 if an answer is correct, else 0. None if the task does not grade answers as correct or wrong.
        rewards: (N, G) rewards by name; NaN if not scored.
        think_opened: whether the prompt of each completion ends with ``<think>``; None if unknown.
        vocabulary: names of the objects that CHAIR looks for.
    """

    indices: list[int]
    texts: list[list[str]]
    values: list[list[Any]]
    references: list[Any]
    rows: list[dict]
    prompts: list[str]
    lengths: np.ndarray
    truncated: np.ndarray
    turns: np.ndarray
    correct: np.ndarray | None = None
    rewards: dict[str, np.ndarray] = field(default_factory=dict)
    think_opened: list[list[bool | None]] | None = None
    vocabulary: Any = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, G)."""
        return len(self.texts), len(self.texts[0])

    def pairs(self) -> tuple[list, list]:
        """Return the N * G parsed answers and the reference of each."""
        return [v for values in self.values for v in values], [r for r in self.references for _ in range(self.shape[1])]


def scores_of(function: Callable, answers: Answers, **options: Any) -> np.ndarray:
    """Return the scores (N, G) of a function of ``vlmkernels.rewards``; 0 for an answer that could not be parsed."""
    scores = function(*answers.pairs(), **options)
    return np.array([0.0 if value is None else value for value in scores]).reshape(answers.shape)


def _ratio(total: np.ndarray) -> np.ndarray:
    return total[:, 0] / total[:, 1]


def _sums(
    answers: Answers,
    statistic: Callable[[Any, Any], Sequence[float]],
    finish: Callable[[np.ndarray], np.ndarray] = _ratio,
) -> Sums:
    """Return the metric ``finish(sum of statistic(parsed answer, reference))`` over all answers."""
    rows = [statistic(value, reference) for value, reference in zip(*answers.pairs(), strict=True)]
    return Sums(np.array(rows, dtype=np.float64).reshape(*answers.shape, -1), finish)


def _mean(function: Callable, **options: Any) -> Callable[[Answers], Statistic]:
    return lambda answers: mean_of(scores_of(function, answers, **options))


# Boxes


def accuracy_at(threshold: float, inclusive: bool, iou: Callable, answers: Answers) -> Sums:
    """Return the share of boxes with IoU >= threshold, or > threshold if not ``inclusive``."""
    ious = scores_of(iou, answers)
    return mean_of((ious >= threshold if inclusive else ious > threshold).astype(float))


def average_precision(threshold: float | None, answers: Answers) -> Statistic:
    """Return COCO's average precision; see ``CocoAP``."""
    return CocoAP(answers.values, [as_boxes(reference) for reference in answers.references], threshold)


# Text


def _error_rate(split: Callable[[str], Sequence], answers: Answers) -> Sums:
    """Return the edit distance divided by the length of the reference, both summed over samples. It can exceed 1.

    An answer that could not be parsed counts as empty. If a sample has several references, the one with the lowest error rate
    is used.
    """
    from rapidfuzz.distance import Levenshtein

    def statistic(value: str | None, reference: Any) -> tuple[int, int]:
        ours = split((value or "").strip())
        several = [split(r) for r in text.texts(reference)]
        return min(((Levenshtein.distance(ours, r), len(r)) for r in several), key=lambda pair: pair[0] / max(pair[1], 1))

    return _sums(answers, statistic)


def _vqa(answers: Answers) -> Sums:
    return _sums(answers, lambda value, reference: (0.0 if value is None else vqa_accuracy(value, reference), 1))


# Yes or no, counted as in POPE (https://arxiv.org/abs/2305.10355).


def confusion(answers: Answers) -> np.ndarray:
    """Return a one-hot vector of six cases for each answer, (N, G, 6).

    The cases are true positive, false positive, false negative, true negative, unparsed with the reference yes, and unparsed
    with the reference no.
    """
    yes = np.array(text.yes_no(["yes"] * answers.shape[0], answers.references)) == 1
    given = np.array([[("yes", "no", None).index(value) for value in values] for values in answers.values])
    return np.eye(6)[2 * given + ~yes[:, None]]


def precision(t: np.ndarray) -> np.ndarray:
    """Return the precision of totals of ``confusion``."""
    return t[:, 0] / (t[:, 0] + t[:, 1])


def recall(t: np.ndarray) -> np.ndarray:
    """Return the recall. Answers that could not be parsed count as false negatives."""
    return t[:, 0] / (t[:, 0] + t[:, 2] + t[:, 4])


def f1(t: np.ndarray) -> np.ndarray:
    """Return the harmonic mean of precision and recall."""
    return 2 * t[:, 0] / (2 * t[:, 0] + t[:, 1] + t[:, 2] + t[:, 4])


def _yes_ratio(t: np.ndarray) -> np.ndarray:
    return (t[:, 0] + t[:, 1]) / t.sum(1)


def pope(finish: Callable[[np.ndarray], np.ndarray]) -> Callable[[Answers], Sums]:
    """Return a metric of the totals (R, 6) of ``confusion``."""
    return lambda answers: Sums(confusion(answers), finish)


# MME: two questions per image, one with the answer yes and one with the answer no. The statistics are per pair.


class _Pair(NamedTuple):
    correct: np.ndarray  # (2, G)
    category: str


def _pairs(answers: Answers) -> list[_Pair]:
    groups: dict[Any, list[int]] = {}
    for place, row in enumerate(answers.rows):
        if row.get("question_id") is None:
            raise ValueError(
                f"sample {answers.indices[place]} must have a column 'question_id', one value per pair of questions"
            )
        groups.setdefault((row.get("category"), row["question_id"]), []).append(place)
    correct = scores_of(text.yes_no, answers)
    for (_, name), places in groups.items():
        if len(places) != 2:
            where = ", ".join(str(answers.indices[place]) for place in places)
            raise ValueError(f"question_id {name!r} must occur twice within its category, got {len(places)} (samples {where})")
    return [_Pair(correct[places], str(category)) for (category, _), places in groups.items()]


def _mme(answers: Answers, single: float, both: float, per_category: bool) -> Sums:
    """Return ``single`` * accuracy + ``both`` * share of pairs with two correct answers.

    With ``per_category``, return the sum of this over the categories.
    """
    pairs = _pairs(answers)
    names = sorted({pair.category for pair in pairs}) if per_category else [None]
    statistics = np.zeros((len(pairs), answers.shape[1], 2 * len(names)))
    for row, pair in zip(statistics, pairs, strict=True):
        place = names.index(pair.category) if per_category else 0
        row[:, 2 * place] = single * pair.correct.mean(0) + both * pair.correct.all(0)
        row[:, 2 * place + 1] = 1
    return Sums(statistics, lambda total: np.nansum(total[:, ::2] / total[:, 1::2], axis=1))


# Captions


def _chair(per_caption: bool, answers: Answers) -> Sums:
    """Return CHAIR (https://arxiv.org/abs/1809.02156).

    It is the share of named objects that are hallucinated or, with ``per_caption``, the share of captions that name one.
    """
    captions, shown = answers.pairs()
    found = mentions([caption or "" for caption in captions], shown, answers.vocabulary)
    rows = [(bool(f.hallucinated), 1) if per_caption else (len(f.hallucinated), len(f.mentioned)) for f in found]
    return Sums(np.array(rows, dtype=np.float64).reshape(*answers.shape, 2), _ratio)


# Any task


def _format(answers: Answers) -> Sums:
    opened = answers.think_opened or [[None] * answers.shape[1]] * answers.shape[0]
    rows = zip(answers.texts, opened, answers.prompts, strict=True)
    has = [[float(has_format(text, prompt, o)) for text, o in zip(*group, strict=True)] for *group, prompt in rows]
    return mean_of(np.array(has))


def _parse_failures(answers: Answers) -> Sums:
    return mean_of(np.array([[float(value is None) for value in values] for values in answers.values]))


def _pass(k: int, answers: Answers) -> Sums:
    return mean_of(pass_at_k(answers.correct, k)[:, None])


def _majority(k: int, answers: Answers) -> Sums:
    values = [[_hashable(value) for value in group] for group in answers.values]
    return mean_of(majority_at_k(values, answers.correct, k)[:, None])


def _hashable(value: Any) -> Any:
    return value.casefold().strip() if isinstance(value, str) else value


@dataclass(frozen=True)
class Metric:
    """A metric.

    Args:
        statistic: computes the metric from answers.
        kind: the kind of answers, or the task, that it needs. "" is any; "graded" is answers that are either correct or wrong.
        doc: one line that explains it on the page.
        sign: +1 if higher is better, -1 if lower is better, 0 otherwise.
        share: whether it is a share, which is shown in percent.
    """

    statistic: Callable[[Answers], Statistic]
    kind: str
    doc: str
    sign: int = 1
    share: bool = True


def _mean_turns(place: int) -> Callable[[Answers], Statistic]:
    return lambda answers: mean_of(answers.turns[..., place])


# Metrics of trajectories, in the order of the last axis of ``Answers.turns``.
TURNS = {
    "mean_turns": Metric(_mean_turns(0), "", "mean turns of the model per completion", 0, share=False),
    "mean_tool_calls": Metric(_mean_turns(1), "", "mean tool calls per completion", 0, share=False),
    "mean_tool_failures": Metric(_mean_turns(2), "", "mean failed tool calls per completion", -1, share=False),
}
METRICS: dict[str, Metric] = {
    "exact_match": Metric(_mean(text.exact_match), "text", "the answer equals the reference, letter by letter"),
    "accuracy": Metric(lambda answers: mean_of(answers.correct), "graded", "the answer is correct"),
    "soft_count": Metric(_mean(text.count, soft=True), "count", "1 - |count - reference| / reference, at least 0"),
    "relaxed_accuracy": Metric(_mean(text.relaxed_accuracy), "text", "numbers within 5 %, texts equal (ChartQA)"),
    "anls": Metric(_mean(text.anls), "text", "average normalized Levenshtein similarity, 0 below 0.5"),
    "cer": Metric(partial(_error_rate, str), "text", "character error rate over all samples", -1),
    "wer": Metric(partial(_error_rate, str.split), "text", "word error rate over all samples", -1),
    "vqa_accuracy": Metric(_vqa, "vqa", "agreement with the answers of people (VQAv2)"),
    "precision": Metric(pope(precision), "yes_no", "share of the answers yes that are correct"),
    "recall": Metric(pope(recall), "yes_no", "share of the questions with the answer yes that were answered yes"),
    "f1": Metric(pope(f1), "yes_no", "harmonic mean of precision and recall"),
    "yes_ratio": Metric(pope(_yes_ratio), "yes_no", "share of answers that are yes", 0),
    "mme_accuracy": Metric(partial(_mme, single=1, both=0, per_category=False), "mme", "questions answered correctly"),
    "mme_accuracy_plus": Metric(partial(_mme, single=0, both=1, per_category=False), "mme", "images with two correct answers"),
    "mme_score": Metric(
        partial(_mme, single=100, both=100, per_category=True),
        "mme",
        "100 (accuracy + accuracy plus), summed over categories",
        share=False,
    ),
    "miou": Metric(_mean(boxes.iou), "box", "mean IoU; 0 if no box could be parsed"),
    "ap": Metric(partial(average_precision, None), "boxes", "COCO's AP, IoU 0.50 to 0.95"),
    "ap50": Metric(partial(average_precision, 0.5), "boxes", "COCO's AP at IoU 0.50"),
    "chair_i": Metric(partial(_chair, False), "objects", "share of named objects that are not in the image", -1),
    "chair_s": Metric(partial(_chair, True), "objects", "share of captions that name an object that is not in the image", -1),
    "format_rate": Metric(_format, "", "<think>...</think><answer>...</answer>, each once"),
    "parse_failure_rate": Metric(_parse_failures, "", "no answer could be parsed", -1),
    "mean_length": Metric(lambda answers: mean_of(answers.lengths), "", "mean tokens per completion", 0, share=False),
    "truncation_rate": Metric(lambda answers: mean_of(answers.truncated), "", "share of truncated completions", -1),
    **TURNS,
}
# Metrics with a number in their name.
NUMBERED = {"acc@": ("IoU", float), "pass@": ("completions", int), "maj@": ("completions", int)}
REWARD = "rewards/"


def names() -> str:
    """Return the names of all metrics, for messages."""
    return ", ".join([*METRICS, *(f"{prefix}<{what}>" for prefix, (what, _) in NUMBERED.items())])


def metric(name: str, inclusive: bool = True, iou: Callable = boxes.iou) -> Metric:
    """Return the metric with a name.

    Args:
        name: a key of ``METRICS``, "acc@<IoU>", "pass@<k>", "maj@<k>" or "rewards/<name>".
        inclusive: whether acc@t counts boxes with an IoU of exactly t.
        iou: the scoring function of boxes.

    Raises:
        ValueError: there is no such metric; the message lists the valid names.
    """
    if name in METRICS:
        return replace(METRICS[name], statistic=_mean(iou)) if METRICS[name].kind == "box" else METRICS[name]
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
            sign = ">=" if inclusive else ">"
            return Metric(partial(accuracy_at, number, inclusive, iou), "box", f"boxes with an IoU {sign} {number:g}")
        if prefix == "pass@":
            return Metric(partial(_pass, number), "graded", f"one of {number} completions is correct, unbiased")
        if prefix == "maj@":
            return Metric(partial(_majority, number), "graded", f"the most frequent answer of {number} completions is correct")
    near = difflib.get_close_matches(name, METRICS, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ValueError(f"metric must be one of {names()}, got {name!r}{hint}")
