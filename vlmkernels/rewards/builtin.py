"""The rewards that have a name: pure functions behind the trainer's signature.

A reward is called with keyword arguments, each a list with one entry per completion: ``prompts``, ``completions`` (text or
messages), ``completion_ids``, ``images``, ``image_sizes`` and ``resized_sizes`` (a list of (width, height) per completion, one
per image, as in the dataset and as the model sees them), and the dataset's other columns. It returns a float per completion, or
None for "not scored".

An answer that cannot be parsed is worth ``unparsed``: 0 by default, because a model could otherwise avoid a bad reward by an
answer that nobody can read. It never passes for a plain 0: it is an ``Unparsed``, and the trainer logs their share.
"""

import functools
import inspect
import math
from collections.abc import Callable

import numpy as np

from vlmkernels.ops.checks import require, require_number
from vlmkernels.rewards import boxes, detection, hallucination, length, text
from vlmkernels.rewards.alignment import ClipScore
from vlmkernels.rewards.answers import PARSERS, Boxes, as_boxes, find_answer, has_format, is_copied, text_of
from vlmkernels.rewards.batch import Unparsed, check_reference
from vlmkernels.rewards.judge import Judge, RewardModel

# What every reward is given beside the dataset's columns.
PROVIDED = ("prompts", "completions", "completion_ids", "images", "image_sizes", "resized_sizes", "trainer_state")


class AnswerReward:
    """A pure function as a reward: the answer in a completion, parsed, against a column of the dataset.

    Args:
        name: under which it is logged.
        score: a pure function of parsed predictions and references.
        kind: what an answer is, a key of ``answers.PARSERS``.
        refuse_copies: take an answer that its prompt gives as an example for no answer. For scores that pay for being near; an
            option, a count or "yes" may be the example by right.
        column: the dataset's column of references; None in it = not scored.
        unparsed: the reward of an answer that cannot be parsed; None = not scored.
        options: keyword arguments of ``score``.
    """

    def __init__(
        self,
        name: str,
        score: Callable,
        kind: str,
        *,
        refuse_copies: bool = False,
        column: str = "answer",
        unparsed: float | None = 0.0,
        **options,
    ):
        if unparsed is not None:
            require_number("unparsed", unparsed, "be a number or None")
        self.__name__, self.score, self.kind, self.refuse_copies = name, score, kind, refuse_copies
        score([], [], **options)  # a wrong option is an error now, not at the first step
        self.column, self.unparsed, self.options = column, Unparsed(math.nan if unparsed is None else unparsed), options

    @property
    def columns(self) -> tuple[str, ...]:
        """The dataset's columns that it needs."""
        return (self.column,)

    def check(self, row: dict) -> None:
        """Raise where a row's reference is none that the score takes."""
        if row.get(self.column) is not None:
            check_reference(self.score.reference, row[self.column], self.column)

    def predictions(self, completions: list, prompts: list) -> list:
        """What each completion answers, None where that cannot be told."""
        parse, parsed = PARSERS[self.kind], []
        for completion, prompt in zip(completions, prompts, strict=True):
            answer = find_answer(text_of(completion))
            copied = self.refuse_copies and answer is not None and is_copied(answer, text_of(prompt))
            parsed.append(None if answer is None or copied else parse(answer))
        return parsed

    def __call__(self, completions: list, prompts: list | None = None, **columns) -> list[float | None]:
        predictions = self.predictions(completions, [""] * len(completions) if prompts is None else prompts)
        predictions, references = self.in_one_frame(predictions, columns[self.column], columns)
        scores = self.score(predictions, references, **self.options)
        unparsed = [p is None and r is not None for p, r in zip(predictions, references, strict=True)]
        return [self.unparsed if missing else score for missing, score in zip(unparsed, scores, strict=True)]

    def in_one_frame(self, predictions: list, references: list, columns: dict) -> tuple[list, list]:
        return predictions, references


class BoxReward(AnswerReward):
    """An ``AnswerReward`` of boxes or points.

    Args:
        frame, reference_frame: keys of ``boxes.FRAMES``: what the model's coordinates count, and those of the column.
        image: the index of the image that they are in, where a sample has several.

    An answer outside its frame by more than 1 % is not parsed: a model that answers in another frame is seen in the count. A
    reference outside its frame is an error.
    """

    def __init__(self, *args, frame: str = "original", reference_frame: str = "original", image: int = 0, **options):
        super().__init__(*args, refuse_copies=True, **options)
        for name, value in (("frame", frame), ("reference_frame", reference_frame)):
            require(value in boxes.FRAMES, name, f"be one of {', '.join(boxes.FRAMES)}", repr(value))
        self.frame, self.reference_frame, self.image = frame, reference_frame, image

    def _sizes(self, sizes: list | None) -> np.ndarray | None:
        """(N, 2), NaN where a sample's size is not known."""
        if sizes is None:
            return None
        of = lambda row: row[self.image] if row is not None and self.image < len(row) else (math.nan, math.nan)  # noqa: E731
        return np.array([of(row) for row in sizes], dtype=np.float64).reshape(-1, 2)

    def in_one_frame(self, predictions: list, references: list, columns: dict) -> tuple[list, list]:
        sizes = {"original": self._sizes(columns.get("image_sizes")), "resized": self._sizes(columns.get("resized_sizes"))}
        references = [None if r is None else check_reference(as_boxes, r, f"references[{i}]") for i, r in enumerate(references)]
        moved = to_frame(references, self.reference_frame, self.reference_frame, sizes)
        for index, (before, after) in enumerate(zip(references, moved, strict=True)):
            if before is not None and after is None:
                of_row = {name: None if size is None else size[[index]] for name, size in sizes.items()}
                width, height = boxes.frame_sizes(self.reference_frame, **of_row)[0].tolist()
                rule = f"lie in the frame {self.reference_frame} of {width:g} x {height:g}"
                raise ValueError(f"references[{index}] must {rule}, got {before.boxes.tolist()}")
        return to_frame(predictions, self.frame, self.reference_frame, sizes), references


def _points(value) -> np.ndarray:
    """The coordinates of boxes, a box or a point: (n, 4) or (n, 2)."""
    return value.boxes if isinstance(value, Boxes) else np.array([value])


def to_frame(values: list, source: str, target: str, sizes: dict[str, np.ndarray | None]) -> list:
    """Boxes, a box or a point per sample from one frame to another; None for those outside the one they are in."""
    chosen = [i for i, value in enumerate(values) if value is not None]
    moved: list = [None] * len(values)
    if not chosen:
        return moved
    points = [_points(values[i]) for i in chosen]
    counts = [len(p) for p in points]
    rows = np.repeat(chosen, counts)
    of_rows = {name: None if size is None else size[rows] for name, size in sizes.items()}
    flat, frame = np.concatenate(points), boxes.frame_sizes(source, **of_rows)
    inside = boxes.inside_frame(flat, frame)
    flat = boxes.convert_frame(flat, source, target, **of_rows)
    unknown = rows[np.isnan(flat).any(axis=1)]
    rule = f"be known to convert from the frame {source} to {target}"
    require(len(unknown) == 0, "image_sizes and resized_sizes", rule, f"None at index {unknown[0] if len(unknown) else 0}")
    ends = np.cumsum(counts)[:-1]
    for index, new, ok in zip(chosen, np.split(flat, ends), np.split(inside, ends), strict=True):
        if ok.all():
            moved[index] = values[index]._replace(boxes=new) if isinstance(values[index], Boxes) else tuple(new[0].tolist())
    return moved


class CosineLength:
    """A half cosine wave of the completion's tokens, for right answers and for wrong ones; see ``length.cosine_length``.

    Args:
        correct: the reward that says what is right, as in a configuration: a name, or a dict with ``name`` and options.
        threshold: the least value of that reward for an answer that is right.
    """

    __name__ = "cosine_length"

    def __init__(
        self,
        *,
        max_length: int,
        correct: str | dict = "exact_match",
        threshold: float = 0.5,
        right: tuple[float, float] = (1.0, 0.5),
        wrong: tuple[float, float] = (-1.0, -0.5),
        exceeded: float = -1.0,
    ):
        self.correct = build(**correct) if isinstance(correct, dict) else build(correct)
        self.threshold = threshold
        self.options = {"max_length": max_length, "right": right, "wrong": wrong, "exceeded": exceeded}
        length.cosine_length([], [], **self.options)

    @property
    def columns(self) -> tuple[str, ...]:
        return required_columns(self.correct)

    def check(self, row: dict) -> None:
        if hasattr(self.correct, "check"):
            self.correct.check(row)

    def __call__(self, completion_ids: list, **columns) -> list[float | None]:
        scores = self.correct(completion_ids=completion_ids, **columns)
        right = [None if s is None or math.isnan(s) else s >= self.threshold for s in scores]
        return length.cosine_length([len(ids) for ids in completion_ids], right, **self.options)


def format(completions: list, prompts: list | None = None, **kwargs) -> list[float]:
    """1 where a completion is ``<think>...</think><answer>...</answer>``, each once, with something in both; else 0."""
    prompts = [""] * len(completions) if prompts is None else prompts
    return [float(has_format(text_of(c), text_of(p))) for c, p in zip(completions, prompts, strict=True)]


def soft_overlong(completion_ids: list, *, max_length: int, cache: int, **kwargs) -> list[float]:
    """DAPO's penalty of the last ``cache`` tokens before ``max_length``, from 0 to -1; see ``length.soft_overlong``."""
    return length.soft_overlong([len(ids) for ids in completion_ids], max_length=max_length, cache=cache)


def repetition(completion_ids: list, *, ngram: int = 3, max_penalty: float = -1.0, **kwargs) -> list[float]:
    """``max_penalty`` times the share of n-grams of tokens that occurred before; see ``length.repetition``."""
    return length.repetition(completion_ids, ngram=ngram, max_penalty=max_penalty)


_TEXT = functools.partial(AnswerReward, refuse_copies=True)

# Score, what an answer is, and how it becomes a reward.
ANSWERS: dict[str, tuple[Callable, str, Callable]] = {
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
OTHERS: dict[str, Callable] = {
    "format": format,
    "cosine_length": CosineLength,
    "soft_overlong": soft_overlong,
    "repetition": repetition,
    "clip_score": ClipScore,
    "judge": Judge,
    "reward_model": RewardModel,
}
NAMES = (*ANSWERS, *OTHERS)


def options_of(target: Callable) -> dict[str, object]:
    """The keyword-only parameters of a function or class, with their defaults."""
    return {p.name: p.default for p in inspect.signature(target).parameters.values() if p.kind is p.KEYWORD_ONLY}


def build(name: str, **options) -> Callable:
    """The built-in reward of a name, with its options. Raises ValueError for other names and options, with the valid ones."""
    require(name in NAMES, "reward", f"be one of {', '.join(NAMES)}", repr(name))
    score, kind, target = ANSWERS.get(name, (None, None, OTHERS.get(name)))
    sources = (target,) if score is None else (AnswerReward, target, score)
    given = {
        option: default for source in sources for option, default in options_of(source).items() if option != "refuse_copies"
    }
    check_options(name, options, list(given))
    missing = [option for option, default in given.items() if default is inspect.Parameter.empty and option not in options]
    require(not missing, f"reward {name}", f"be given {', '.join(missing)}", ", ".join(options) or "no options")
    if score is not None:
        return target(name, score, kind, **options)
    return target(**options) if isinstance(target, type) else functools.partial(target, **options)


def check_options(name: str, options: dict, valid: list[str]) -> None:
    unknown = [option for option in options if option not in valid]
    require(not unknown, f"options of the reward {name}", f"be among {', '.join(valid) or 'none'}", ", ".join(unknown))


def arguments_of(reward: Callable, required: bool = False) -> list[str]:
    """The dataset's columns and options that a function or class takes by name; ``required``: those without a default alone."""
    parameters = inspect.signature(reward).parameters.values()
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in PROVIDED]
    return [p.name for p in by_name if not required or p.default is p.empty]


def required_columns(reward: Callable) -> tuple[str, ...]:
    """The dataset's columns that a reward needs: those it declares as ``columns``, or else its arguments without a default."""
    declared = getattr(reward, "columns", None)
    return tuple(arguments_of(reward, required=True) if declared is None else declared)
