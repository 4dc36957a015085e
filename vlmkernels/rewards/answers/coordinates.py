"""Parse boxes and points."""

import ast
import json
import math
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vlmkernels.rewards.answers.only import only

_FENCE = re.compile(r"```(?:json)?(.*?)```", re.DOTALL)
_BOX = re.compile(r"[\[(]\s*" + r"\s*,\s*".join([r"([-+]?\d+(?:\.\d+)?)"] * 4) + r"\s*[\])]")
_POINT = re.compile(r"[\[(]\s*" + r"\s*,\s*".join([r"([-+]?\d+(?:\.\d+)?)"] * 2) + r"\s*[\])]")
_BOX_KEYS = ("bbox_2d", "bbox", "box", "Position")
_POINT_KEYS = ("point_2d", "point")
_LABEL_KEYS = ("label", "category")
_SCORE_KEYS = ("score", "confidence", "Confidence")


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


def boxes_in(text: str) -> list[tuple[float, ...]]:
    """Return the lists of four numbers in a running text."""
    return [tuple(map(float, found)) for found in _BOX.findall(text)]


def parse_boxes(text: str) -> Boxes | None:
    """Parse boxes from JSON, a Python literal, or lists of four numbers in running text. "[]" and "none" mean no boxes.

    Returns None if the text has no boxes, or if a box is not finite or has no area.
    """
    if text.strip().lower() in ("none", "none."):
        return as_boxes([])
    value = _literal(text)
    if not isinstance(value, (list, tuple, dict)):
        value = boxes_in(text) or None
    try:
        return as_boxes(value)
    except ValueError:
        return None


def parse_box(text: str) -> tuple[float, float, float, float] | None:
    """Parse the only box in a text; see ``parse_boxes``."""
    found = parse_boxes(text)
    return None if found is None else only(list(map(tuple, found.boxes.tolist())))


def parse_point(text: str) -> tuple[float, float] | None:
    """Parse the only point ``(x, y)`` in a text, or return the center of its only box."""
    value = _literal(text)
    value = value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value
    if isinstance(value, dict) and (key := _key(value, _POINT_KEYS)):
        value = value[key]
    points: list[Any] = [value] if _is_numbers(value, 2) else [tuple(map(float, found)) for found in _POINT.findall(text)]
    if not points and (box := parse_box(text)) is not None:
        points = [((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)]
    point = only(points)
    if point is None or not all(abs(v) <= sys.float_info.max for v in point):
        return None
    return float(point[0]), float(point[1])
