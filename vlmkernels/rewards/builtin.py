"""The built-in rewards, by name: scoring functions with the interface of ``RewardFunction``.

An answer that cannot be parsed gets the reward ``unparsed``. Its default is 0 rather than None (not scored): otherwise a model
could avoid a low reward by writing answers that cannot be parsed. The reward is an ``Unparsed``, so that the trainer can count
and log such answers separately from answers that score 0.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, cast

import numpy as np

from vlmkernels.ops.checks import require_one_of
from vlmkernels.rewards import boxes, detection, hallucination, length, text
from vlmkernels.rewards.alignment import ClipScore
from vlmkernels.rewards.answers import PARSERS, Boxes, Messages, as_boxes, find_answer, has_format, is_copied, text_of
from vlmkernels.rewards.batch import ScoringFunction, Unparsed, check_reference
from vlmkernels.rewards.judge import Judge, RewardModel
from vlmkernels.rewards.signature import check_options, options_of, required_columns


def _known(
    count: int, prompts: Sequence[str | Messages] | None, think_opened: Sequence[bool | None] | None
) -> tuple[Sequence[str | Messages], Sequence[bool | None]]:
    """Return prompts and think_opened of each completion: "" and None where they are unknown."""
    return [""] * count if prompts is None else prompts, [None] * count if think_opened is None else think_opened


class AnswerReward:
    """Parse the answer in each completion and score it against a column of the dataset.

    Args:
        name: name in the logs.
        score: a scoring function decorated with ``batch.pure``.
        kind: kind of the answer, a key of ``answers.PARSERS``.
        refuse_copies: treat an answer that is copied from an example in the prompt as unparsed. For scores with partial credit
            only: an option letter, a count or "yes" from the prompt can be correct.
        column: column of the dataset with the references. Samples whose reference is None are not scored.
        unparsed: the reward of an answer that cannot be parsed; None = not scored.
        options: keyword arguments of ``score``.
    """

    def __init__(
        self,
        name: str,
        score: ScoringFunction,
        kind: str,
        *,
        refuse_copies: bool = False,
        column: str = "answer",
        unparsed: float | None = 0.0,
        **options: Any,
    ):
        if unparsed is not None and (not isinstance(unparsed, Real) or isinstance(unparsed, bool)):
            raise TypeError(f"unparsed must be a number or None, got {unparsed!r}")
        self.__name__, self.score, self.kind, self.refuse_copies = name, score, kind, refuse_copies
        score([], [], **options)  # raise for an invalid option now rather than at the first step
        self.column, self.unparsed, self.options = column, Unparsed(math.nan if unparsed is None else unparsed), options

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the dataset that the reward needs."""
        return (self.column,)

    def check(self, row: dict[str, Any]) -> None:
        """Raise ValueError or TypeError if the scoring function cannot parse the reference in a row of the dataset."""
        if row.get(self.column) is not None:
            check_reference(self.score.reference, row[self.column], self.column)

    def predictions(
        self,
        completions: Sequence[str | Messages],
        prompts: Sequence[str | Messages],
        think_opened: Sequence[bool | None],
    ) -> list[Any]:
        """Return the parsed answer of each completion, or None if it has none."""
        parse, parsed = PARSERS[self.kind], []
        for completion, prompt, opened in zip(completions, prompts, think_opened, strict=True):
            answer = find_answer(text_of(completion), opened)
            copied = self.refuse_copies and answer is not None and is_copied(answer, text_of(prompt))
            parsed.append(None if answer is None or copied else parse(answer))
        return parsed

    def __call__(
        self,
        completions: Sequence[str | Messages],
        prompts: Sequence[str | Messages] | None = None,
        think_opened: Sequence[bool | None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        predictions = self.predictions(completions, *_known(len(completions), prompts, think_opened))
        predictions, references = self.in_one_frame(predictions, columns[self.column], columns)
        scores = self.score(predictions, references, **self.options)
        unparsed = [p is None and r is not None for p, r in zip(predictions, references, strict=True)]
        pairs = zip(unparsed, scores, strict=True)
        return [self.unparsed if missing or isinstance(score, Unparsed) else score for missing, score in pairs]

    def in_one_frame(
        self, predictions: list[Any], references: list[Any], columns: dict[str, Any]
    ) -> tuple[list[Any], list[Any]]:
        """Convert predictions and references to one coordinate frame. The base class returns them unchanged."""
        return predictions, references


class BoxReward(AnswerReward):
    """An ``AnswerReward`` for boxes and points, which converts the answer to the frame of the reference.

    An answer that lies more than 1 % outside its frame counts as unparsed, so that the logs show when a model answers in
    another frame. A reference outside its frame raises ValueError.

    Args:
        args, options: see ``AnswerReward``.
        frame: coordinate frame of the model's answers, a key of ``boxes.FRAMES``.
        reference_frame: coordinate frame of the references.
        image: index of the image that the coordinates refer to, in samples with several images.
    """

    def __init__(self, *args: Any, frame: str = "original", reference_frame: str = "original", image: int = 0, **options: Any):
        super().__init__(*args, refuse_copies=True, **options)
        require_one_of("frame", frame, boxes.FRAMES)
        require_one_of("reference_frame", reference_frame, boxes.FRAMES)
        self.frame, self.reference_frame, self.image = frame, reference_frame, image

    def _sizes(self, sizes: list[Any] | None) -> np.ndarray | None:
        """Return the width and height of each sample's image, (N, 2); NaN if unknown."""
        if sizes is None:
            return None
        known = [row is not None and self.image < len(row) for row in sizes]
        rows = [row[self.image] if is_known else (math.nan, math.nan) for row, is_known in zip(sizes, known, strict=True)]
        return np.array(rows, dtype=np.float64).reshape(-1, 2)

    def in_one_frame(
        self, predictions: list[Any], references: list[Any], columns: dict[str, Any]
    ) -> tuple[list[Any], list[Any]]:
        sizes = {"original": self._sizes(columns.get("image_sizes")), "resized": self._sizes(columns.get("resized_sizes"))}
        references = [None if r is None else check_reference(as_boxes, r, f"references[{i}]") for i, r in enumerate(references)]
        moved = to_frame(references, self.reference_frame, self.reference_frame, sizes)
        for index, (before, after) in enumerate(zip(references, moved, strict=True)):
            if before is not None and after is None:
                own_sizes = {name: None if size is None else size[[index]] for name, size in sizes.items()}
                ((width, height),) = np.asarray(boxes.frame_sizes(self.reference_frame, **own_sizes))
                raise ValueError(
                    f"references[{index}] must lie inside the {self.reference_frame} frame of {width:g} x {height:g}, "
                    f"got {before.boxes.tolist()}"
                )
        return to_frame(predictions, self.frame, self.reference_frame, sizes), references


def _points(value: Boxes | tuple[float, ...]) -> np.ndarray:
    """Return the coordinates of ``Boxes``, (n, 4), of one box, (1, 4), or of one point, (1, 2)."""
    return value.boxes if isinstance(value, Boxes) else np.array([value])


def to_frame(
    values: list[Any], source: str, target: str, sizes: dict[str, np.ndarray | None], slack: float = 0.01
) -> list[Any]:
    """Convert the boxes, box or point of each sample from one coordinate frame to another.

    Args:
        values: ``Boxes``, a box (4 numbers), a point (2 numbers) or None for each sample.
        source, target: keys of ``boxes.FRAMES``.
        sizes: the keys "original" and "resized" with the (N, 2) sizes of the samples' images in pixels, or None.
        slack: how far a value may lie outside the source frame, as a fraction of its size.

    Returns:
        The converted values; None for a value outside the source frame.

    Raises:
        ValueError: the size of an image is needed but unknown.
    """
    chosen = [i for i, value in enumerate(values) if value is not None]
    moved: list[Any] = [None] * len(values)
    if not chosen:
        return moved
    points = [_points(values[i]) for i in chosen]
    counts = [len(p) for p in points]
    rows = np.repeat(chosen, counts)
    row_sizes = {name: None if size is None else size[rows] for name, size in sizes.items()}
    flat = np.concatenate(points)
    inside = boxes.inside_frame(flat, boxes.frame_sizes(source, **row_sizes), slack)
    flat = boxes.convert_frame(flat, source, target, **row_sizes)
    unknown = rows[np.isnan(flat).any(axis=1)]
    if len(unknown):
        raise ValueError(
            f"image_sizes and resized_sizes must be known to convert from the {source} frame to the {target} frame, "
            f"got None at index {unknown[0]}"
        )
    ends = np.cumsum(counts)[:-1]
    for index, new, ok in zip(chosen, np.split(flat, ends), np.split(inside, ends), strict=True):
        if ok.all():
            moved[index] = values[index]._replace(boxes=new) if isinstance(values[index], Boxes) else tuple(new[0].tolist())
    return moved


class CosineLength:
    """Reward that follows half a cosine wave over the completion length, with one wave for correct and one for wrong answers.

    Args:
        max_length, right, wrong, exceeded: see ``length.cosine_length``.
        correct: the built-in reward that decides which answers are correct: a name, or a dict with ``name`` and options.
        threshold: an answer is correct if the reward ``correct`` is at least this value.
    """

    __name__ = "cosine_length"

    def __init__(
        self,
        *,
        max_length: int,
        correct: str | dict[str, Any] = "exact_match",
        threshold: float = 0.5,
        right: tuple[float, float] = (1.0, 0.5),
        wrong: tuple[float, float] = (-1.0, -0.5),
        exceeded: float = -1.0,
    ):
        self.correct = build(**correct) if isinstance(correct, dict) else build(correct)
        self.threshold = threshold
        self.score = functools.partial(length.cosine_length, max_length=max_length, right=right, wrong=wrong, exceeded=exceeded)
        self.score([], [])  # raise for an invalid option now

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the dataset that the reward needs."""
        return required_columns(self.correct)

    def check(self, row: dict[str, Any]) -> None:
        """Raise ValueError or TypeError if ``correct`` cannot parse the reference in a row of the dataset."""
        if hasattr(self.correct, "check"):
            self.correct.check(row)

    def __call__(self, completion_ids: list[Sequence[int]], **columns: Any) -> list[float | None]:
        scores = self.correct(completion_ids=completion_ids, **columns)
        right = [None if s is None or math.isnan(s) else s >= self.threshold for s in scores]
        return self.score([len(ids) for ids in columns.get("sampled_ids", completion_ids)], right)


def think_answer_format(
    completions: Sequence[str | Messages],
    prompts: Sequence[str | Messages] | None = None,
    think_opened: Sequence[bool | None] | None = None,
    **kwargs: Any,
) -> list[float]:
    """1 if a completion is ``<think>...</think><answer>...</answer>`` with both elements once and not empty, else 0.

    If the prompt ends with ``<think>``, the completion must not repeat the tag. Where ``think_opened`` is unknown, a completion
    may begin with or without it.
    """
    rows = zip(completions, *_known(len(completions), prompts, think_opened), strict=True)
    return [float(has_format(text_of(completion), text_of(prompt), opened)) for completion, prompt, opened in rows]


def soft_overlong(completion_ids: list[Sequence[int]], *, max_length: int, cache: int, **kwargs: Any) -> list[float]:
    """DAPO's length penalty, which falls from 0 to -1 over the last ``cache`` tokens before ``max_length``."""
    return length.soft_overlong([len(ids) for ids in completion_ids], max_length=max_length, cache=cache)


def repetition(completion_ids: list[Sequence[int]], *, ngram: int = 3, max_penalty: float = -1.0, **kwargs: Any) -> list[float]:
    """``max_penalty`` times the share of token n-grams that repeat an earlier one. Results of tools do not count."""
    return length.repetition(kwargs.get("sampled_ids", completion_ids), ngram=ngram, max_penalty=max_penalty)


_TEXT = functools.partial(AnswerReward, refuse_copies=True)

# Name -> scoring function, kind of answer, and the class that turns them into a reward.
ANSWERS: dict[str, tuple[ScoringFunction, str, Callable[..., AnswerReward]]] = {
    "exact_match": (text.exact_match, "text", AnswerReward),
    "choice": (text.choice, "choice", AnswerReward),
    "yes_no": (text.yes_no, "yes_no", AnswerReward),
    "numeric": (text.numeric, "number", AnswerReward),
    "math_equal": (text.math_equal, "text", AnswerReward),
    "count": (text.count, "count", AnswerReward),
    "relaxed_accuracy": (text.relaxed_accuracy, "text", AnswerReward),
    "cer": (text.cer, "text", _TEXT),
    "edit_ratio": (text.edit_ratio, "text", _TEXT),
    "anls": (text.anls, "text", _TEXT),
    "chair": (hallucination.chair, "text", _TEXT),
    "iou": (boxes.iou, "box", BoxReward),
    "giou": (boxes.giou, "box", BoxReward),
    "point_in_box": (boxes.point_in_box, "point", BoxReward),
    "matched_iou": (detection.matched_iou, "boxes", BoxReward),
    "weighted_match": (detection.weighted_match, "boxes", BoxReward),
    "mean_ap": (detection.mean_ap, "boxes", BoxReward),
}
OTHERS: dict[str, Callable[..., Any]] = {
    "think_answer_format": think_answer_format,
    "cosine_length": CosineLength,
    "soft_overlong": soft_overlong,
    "repetition": repetition,
    "clip_score": ClipScore,
    "judge": Judge,
    "reward_model": RewardModel,
}
NAMES = (*ANSWERS, *OTHERS)
# The rewards that are pure functions of texts, token ids, sizes and columns, and need no model or connection.
PURE = (*ANSWERS, "think_answer_format", "cosine_length", "soft_overlong", "repetition")


def build(name: str, **options: Any) -> Callable[..., Any]:
    """Build a built-in reward. Raises ValueError for an unknown name, an unknown option or a missing option."""
    require_one_of("reward", name, NAMES)
    sources = (AnswerReward, ANSWERS[name][2], ANSWERS[name][0]) if name in ANSWERS else (OTHERS[name],)
    valid = {option: default for source in sources for option, default in options_of(source).items()}
    valid.pop("refuse_copies", None)
    check_options(name, options, list(valid))
    missing = [option for option, default in valid.items() if default is inspect.Parameter.empty and option not in options]
    if missing:
        raise ValueError(f"options of the reward {name} must include {', '.join(missing)}, got {', '.join(options) or 'none'}")
    if name in ANSWERS:
        score, kind, reward = ANSWERS[name]
        return reward(name, score, kind, **options)
    target = OTHERS[name]
    if isinstance(target, type):
        return cast(Callable[..., Any], target(**options))
    return functools.partial(target, **options)
