"""From a completion's text to an answer. Each function returns None where there is none: several are none.

That an answer which names more than one candidate is not parsed is the guard against most hacks of rules: a second
``<answer>``, the prompt's list of options copied back, "yes or no", all numbers from 0 to 9, a page of boxes where one is asked
for.
"""

import ast
import json
import math
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer)>")
_FORMAT = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?%?(?!\w)"
)  # a thousands separator, decimals, an exponent, a percentage
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


class Boxes(NamedTuple):
    """n boxes of an answer or a dataset: (n, 4) fp64, x1, y1, x2, y2; a label and a confidence where they have one."""

    boxes: np.ndarray
    labels: list[str | None]
    scores: list[float | None]


def text_of(value: str | list[dict]) -> str:
    """The text of a completion or prompt, given as text or as messages; images leave no trace."""
    if isinstance(value, str):
        return value
    parts = (part for message in value for part in _parts(message["content"]))
    return "".join(part.get("text") or "" for part in parts)


def _parts(content: str | list[dict]) -> list[dict]:
    return [{"text": content}] if isinstance(content, str) else content


def find_answer(text: str) -> str | None:
    """What the one ``<answer>`` element holds; the whole text, after its one ``</think>``, where no answer tag occurs.

    None where the element occurs twice, is not closed, is nested or empty.
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
    """Whether an answer is an example that its prompt gives: what one of the prompt's ``<answer>`` elements holds, or boxes
    that all occur in it."""
    if answer in map(str.strip, _ANSWER.findall(prompt)):
        return True
    given = {tuple(map(float, box)) for box in _BOX.findall(prompt)}
    found = [tuple(map(float, box)) for box in _BOX.findall(answer)] if given else []
    return bool(found) and given.issuperset(found)


def has_format(text: str, prompt: str = "") -> bool:
    """Whether a text is ``<think>...</think><answer>...</answer>``, each once, nothing outside, and something in both.

    Something: a letter or digit, and not what the same element of the prompt holds, which a model can copy without thinking.
    """
    match = _FORMAT.fullmatch(text)
    if not match or len(_TAG.findall(text)) != 4:
        return False
    think, answer = match[1].strip(), match[2].strip()
    written = all(any(map(str.isalnum, part)) for part in (think, answer))
    return written and f"<think>{think}</think>" not in re.sub(r"(?<=>)\s+|\s+(?=<)", "", prompt)


def _only(found: list):
    """The one value that was found, however often."""
    return found[0] if found and all(value == found[0] for value in found) else None


def as_number(text: str) -> float:
    """The number that a text is, "1,234.5" or "12%" (0.12) too. Raises ValueError."""
    text = text.strip()
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"must be a number, got {text!r:.80}")
    value = float(text.rstrip("%").replace(",", ""))
    return value / 100 if text.endswith("%") else value


def parse_number(text: str) -> float | None:
    """The one number in a text, whatever words surround it; a percentage is a hundredth."""
    return _only([value for value in map(as_number, _NUMBER.findall(text)) if math.isfinite(value)])


def parse_count(text: str) -> float | None:
    """The one count in a text, in digits or as a word up to ten."""
    words = [float(_COUNT_WORDS.index(word)) for word in _COUNT_WORD.findall(text.lower())]
    return _only([value for value in map(as_number, _NUMBER.findall(text)) if math.isfinite(value)] + words)


def parse_choice(text: str) -> str | None:
    """The one option letter of a text: "B", "(b)", "**B.** a cat", "The answer is B"."""
    text = text.replace("*", "").strip()
    if match := _OPTION.fullmatch(text):
        return match[1].upper()
    return _only([next(filter(None, groups)) for groups in _OPTIONS.findall(text)])


def parse_yes_no(text: str) -> str | None:
    """The one of "yes" and "no" that occurs as a word."""
    return _only(_YES_NO.findall(text.lower()))


def _literal(text: str) -> object:
    """The list, tuple or dict that a text, or its one code block, is in JSON or Python; None where it is none."""
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


def _key(row: dict, keys: tuple[str, ...]) -> str | None:
    return next((key for key in keys if key in row), None)


def _is_numbers(value: object, count: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == count and all(type(v) in (int, float) for v in value)


def as_boxes(value: object) -> Boxes:
    """The boxes that a value stands for. Raises ValueError for any other, and for a box that is not finite or has no area.

    Args:
        value: a box, a list of boxes, or a list of dicts of the same keys: the box as ``bbox_2d`` (``bbox``, ``box``,
            ``Position``), and optionally ``label`` and ``score`` (``confidence``); or such a list as JSON; or ``Boxes``.
    """
    if isinstance(value, Boxes):
        return value
    rows = _literal(value) if isinstance(value, str) else value
    rows = rows.tolist() if hasattr(rows, "tolist") else rows
    rows = [rows] if _is_numbers(rows, 4) or isinstance(rows, dict) else rows
    if not isinstance(rows, (list, tuple)):
        raise ValueError(f"must be boxes (x1, y1, x2, y2), got {value!r:.80}")
    boxes, labels, scores = rows, [None] * len(rows), [None] * len(rows)
    if rows and isinstance(rows[0], dict):
        box, label, score = (_key(rows[0], keys) for keys in (_BOX_KEYS, _LABEL_KEYS, _SCORE_KEYS))
        try:
            boxes = [row[box] for row in rows]
            labels = [str(row[label]).strip().lower() for row in rows] if label else labels
            scores = [float(row[score]) for row in rows] if score else scores
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            rule = f"have {' or '.join(_BOX_KEYS)}, and one label and score each or none"
            raise ValueError(f"must {rule}, got {rows!r:.80}") from error
    try:
        corners = np.array(boxes, dtype=np.float64).reshape(-1, 4) if len(boxes) else np.empty((0, 4))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"must be boxes of 4 numbers, got {boxes!r:.80}") from error
    if len(corners) != len(boxes):
        raise ValueError(f"must be boxes of 4 numbers, got {boxes!r:.80}")
    wrong = ~((corners[:, :2] < corners[:, 2:]).all(1) & (np.abs(corners) < np.inf).all(1))
    if wrong.any():
        raise ValueError(f"must have boxes with x1 < x2 and y1 < y2, finite, got {corners[wrong][0].tolist()}")
    if not all(score is None or math.isfinite(score) for score in scores):
        raise ValueError(f"must have finite scores, got {scores!r:.80}")
    return Boxes(corners, labels, scores)


def parse_boxes(text: str) -> Boxes | None:
    """The boxes of an answer: JSON, a Python literal, or lists of four numbers among words. "[]" and "none" are no boxes.

    None where there are none, and where one of them is not finite or has no area.
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
    """The one box of an answer; see ``parse_boxes``."""
    found = parse_boxes(text)
    return None if found is None else _only(list(map(tuple, found.boxes.tolist())))


def parse_point(text: str) -> tuple[float, float] | None:
    """The one point ``(x, y)`` of an answer, or the centre of its one box."""
    value = _literal(text)
    value = value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value
    if isinstance(value, dict) and (key := _key(value, _POINT_KEYS)):
        value = value[key]
    points = [value] if _is_numbers(value, 2) else [tuple(map(float, found)) for found in _POINT.findall(text)]
    if not points and (box := parse_box(text)) is not None:
        points = [((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)]
    point = _only(points)
    return None if point is None or not all(abs(v) <= sys.float_info.max for v in point) else tuple(map(float, point))


# What an answer is, by the name of its kind.
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
