"""Find the answer in a completion and parse it. Parsers return None if the text has no answer or an ambiguous one.

Rejecting ambiguous answers prevents most hacks of rule-based rewards: a second ``<answer>``, a copy of the prompt's list of
options, "yes or no", all numbers from 0 to 9, many boxes where the question is about one.
"""

import ast
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer)>")
_FORMAT = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
# Numbers may have thousands separators, decimals, an exponent and a percent sign.
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?%?(?!\w)")
_COUNT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_COUNT_WORD = re.compile(rf"\b({'|'.join(_COUNT_WORDS)})\b")
_OPTION = re.compile(r"[(\[]?([A-Za-z])[)\].:]?")
_OPTIONS = re.compile(
    r"(?<![A-Za-z])(?:\(([A-Z])\)|([A-Z])[).:](?![A-Za-z])|(?:[Aa]nswer|[Oo]ption)(?: is)?:? ([A-Z])(?![A-Za-z]))"
)
_YES_NO = re.compile(r"\b(yes|no)\b")
_FENCE = re.compile(r"```(?:json)?(.*?)```", re.DOTALL)
_BOX = re.compile(r"[\[(]\s*" + r"\s*,\s*".join([r"([-+]?\d+(?:\.\d+)?)"] * 4) + r"\s*[\])]")
_POINT = re.compile(r"[\[(]\s*" + r"\s*,\s*".join([r"([-+]?\d+(?:\.\d+)?)"] * 2) + r"\s*[\])]")
_BOX_KEYS = ("bbox_2d", "bbox", "box", "Position")
_POINT_KEYS = ("point_2d", "point")
_LABEL_KEYS = ("label", "category")
_SCORE_KEYS = ("score", "confidence", "Confidence")


Messages = list[dict[str, Any]]  # a conversation: messages with ``role`` and ``content``


class Boxes(NamedTuple):
    """The boxes of an answer or of a reference.

    Attributes:
        boxes: (n, 4) fp64, each box x1, y1, x2, y2.
        labels: the label of each box, or None.
        scores: the confidence of each box, or None.
    """

    boxes: np.ndarray
    labels: list[str | None]
    scores: list[float | None]


def text_of(value: str | Messages) -> str:
    """Return the text of a prompt or completion, given as a string or as a list of messages. Images are left out."""
    if isinstance(value, str):
        return value
    parts = (part for message in value for part in _parts(message["content"]))
    return "".join(part.get("text") or "" for part in parts)


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"text": content}] if isinstance(content, str) else content


def find_answer(text: str) -> str | None:
    """Return the content of the ``<answer>`` element, or if there is none, the text after ``</think>``, or the whole text.

    Returns None if the answer is empty or contains tags, if ``<answer>`` is repeated or not closed, or if ``</think>`` is
    repeated in a text without ``<answer>``.
    """
    tags = text.count("<answer>"), text.count("</answer>")
    if tags == (0, 0):
        if text.count("</think>") > 1:
            return None
        answer = text.rpartition("</think>")[2]
    elif tags == (1, 1) and (match := _ANSWER.search(text)):
        answer = match[1]
    else:
        return None
    return None if not (answer := answer.strip()) or _TAG.search(answer) else answer


def is_copied(answer: str, prompt: str) -> bool:
    """Whether an answer equals the content of an ``<answer>`` element in the prompt, or has only boxes that the prompt has."""
    if answer in map(str.strip, _ANSWER.findall(prompt)):
        return True
    given = {tuple(map(float, box)) for box in _BOX.findall(prompt)}
    found = [tuple(map(float, box)) for box in _BOX.findall(answer)] if given else []
    return bool(found) and given.issuperset(found)


def has_format(text: str, prompt: str = "") -> bool:
    """Whether a text is ``<think>...</think><answer>...</answer>``, with each element once and nothing outside.

    Both elements must contain a letter or digit, and the ``<think>`` element must not be copied from the prompt.
    """
    match = _FORMAT.fullmatch(text)
    if not match or len(_TAG.findall(text)) != 4:
        return False
    think, answer = match[1].strip(), match[2].strip()
    written = all(any(map(str.isalnum, part)) for part in (think, answer))
    return written and f"<think>{think}</think>" not in re.sub(r"(?<=>)\s+|\s+(?=<)", "", prompt)


def _only(found: list[T]) -> T | None:
    """Return the common value of a list, or None if the list is empty or its values differ."""
    return found[0] if found and all(value == found[0] for value in found) else None


def as_number(text: str) -> float:
    """Parse a text that consists of one number, such as "1,234.5" or "12%" (0.12). Raises ValueError for any other text."""
    text = text.strip()
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"must be a number, got {text!r:.80}")
    value = float(text.rstrip("%").replace(",", ""))
    return value / 100 if text.endswith("%") else value


def parse_number(text: str) -> float | None:
    """Parse the only number in a text; "12%" is 0.12."""
    return _only([value for value in map(as_number, _NUMBER.findall(text)) if math.isfinite(value)])


def parse_count(text: str) -> float | None:
    """Parse the only count in a text, written in digits or as a word from zero to ten."""
    words = [float(_COUNT_WORDS.index(word)) for word in _COUNT_WORD.findall(text.lower())]
    return _only([value for value in map(as_number, _NUMBER.findall(text)) if math.isfinite(value)] + words)


def parse_choice(text: str) -> str | None:
    """Parse the only option letter in a text: "B", "(b)", "**B.** a cat", "The answer is B"."""
    text = text.replace("*", "").strip()
    if match := _OPTION.fullmatch(text):
        return match[1].upper()
    return _only([next(filter(None, groups)) for groups in _OPTIONS.findall(text)])


def parse_yes_no(text: str) -> str | None:
    """Return "yes" or "no", whichever occurs in a text, or None if both or neither occur."""
    return _only(_YES_NO.findall(text.lower()))


def _literal(text: str) -> object:
    """Parse a JSON or Python list, tuple or dict from a text or its only code block. Returns None for any other text."""
    blocks = _FENCE.findall(text)
    if len(blocks) > 1:
        return None
    text = (blocks[0] if blocks else text).strip()
    for read in (json.loads, ast.literal_eval) if text.startswith(("[", "{", "(")) else ():
        try:
            return read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            continue
    return None


def _key(row: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    return next((key for key in keys if key in row), None)


def _is_numbers(value: object, count: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == count and all(type(v) in (int, float) for v in value)


def as_boxes(value: object) -> Boxes:
    """Convert a value to ``Boxes``.

    Args:
        value: a box, a dict, a list of boxes or dicts, an array or tensor (n, 4), a string with any of these as a JSON or
            Python literal, or ``Boxes``. A dict has the box under ``bbox_2d``, ``bbox``, ``box`` or ``Position``, and
            optionally ``label`` (or ``category``) and ``score`` (or ``confidence``, ``Confidence``). All dicts must use the
            same keys.

    Raises:
        ValueError: the value has another form, a box is not finite or has no area, or a score is not finite.
    """
    if isinstance(value, Boxes):
        return value
    rows = _literal(value) if isinstance(value, str) else value
    rows = rows.tolist() if hasattr(rows, "tolist") else rows
    rows = [rows] if _is_numbers(rows, 4) or isinstance(rows, dict) else rows
    if not isinstance(rows, (list, tuple)):
        raise ValueError(f"must be boxes (x1, y1, x2, y2), got {value!r:.80}")
    boxes: Sequence[Any] = rows
    labels: list[str | None] = [None] * len(rows)
    scores: list[float | None] = [None] * len(rows)
    if rows and isinstance(rows[0], dict):
        box, label, score = (_key(rows[0], keys) for keys in (_BOX_KEYS, _LABEL_KEYS, _SCORE_KEYS))
        try:
            boxes = [row[box] for row in rows]
            labels = [str(row[label]).strip().lower() for row in rows] if label else labels
            scores = [float(row[score]) for row in rows] if score else scores
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            keys = " or ".join(_BOX_KEYS)
            raise ValueError(f"must have {keys}, with the same keys in every dict, got {rows!r:.80}") from error
    try:
        corners = np.array(boxes, dtype=np.float64).reshape(-1, 4) if len(boxes) else np.empty((0, 4))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"must be boxes of 4 numbers, got {boxes!r:.80}") from error
    if len(corners) != len(boxes):
        raise ValueError(f"must be boxes of 4 numbers, got {boxes!r:.80}")
    wrong = ~((corners[:, :2] < corners[:, 2:]).all(1) & (np.abs(corners) < np.inf).all(1))
    if wrong.any():
        raise ValueError(f"must have finite boxes with x1 < x2 and y1 < y2, got {corners[wrong][0].tolist()}")
    if not all(score is None or math.isfinite(score) for score in scores):
        raise ValueError(f"must have finite scores, got {scores!r:.80}")
    return Boxes(corners, labels, scores)


def parse_boxes(text: str) -> Boxes | None:
    """Parse boxes from JSON, a Python literal, or lists of four numbers in running text. "[]" and "none" mean no boxes.

    Returns None if the text has no boxes, or if a box is not finite or has no area.
    """
    if text.strip().lower() in ("none", "none."):
        return as_boxes([])
    value = _literal(text)
    if not isinstance(value, (list, tuple, dict)):
        value = [tuple(map(float, found)) for found in _BOX.findall(text)] or None
    try:
        return as_boxes(value)
    except ValueError:
        return None


def parse_box(text: str) -> tuple[float, float, float, float] | None:
    """Parse the only box in a text; see ``parse_boxes``."""
    found = parse_boxes(text)
    return None if found is None else _only(list(map(tuple, found.boxes.tolist())))


def parse_point(text: str) -> tuple[float, float] | None:
    """Parse the only point ``(x, y)`` in a text, or return the center of its only box."""
    value = _literal(text)
    value = value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value
    if isinstance(value, dict) and (key := _key(value, _POINT_KEYS)):
        value = value[key]
    points: list[Any] = [value] if _is_numbers(value, 2) else [tuple(map(float, found)) for found in _POINT.findall(text)]
    if not points and (box := parse_box(text)) is not None:
        points = [((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)]
    point = _only(points)
    if point is None or not all(abs(v) <= sys.float_info.max for v in point):
        return None
    return float(point[0]), float(point[1])


# Kind of answer -> its parser.
PARSERS: dict[str, Callable[[str], object]] = {
    "text": str.strip,
    "number": parse_number,
    "count": parse_count,
    "choice": parse_choice,
    "yes_no": parse_yes_no,
    "box": parse_box,
    "boxes": parse_boxes,
    "point": parse_point,
}
