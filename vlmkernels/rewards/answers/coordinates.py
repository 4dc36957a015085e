"""Parse boxes and points in JSON, Python literals, lists of numbers in running text, and the markup that models write."""

import math
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from vlmkernels.rewards.answers.literals import FOUR, NUMBER, TWO, Found, is_balanced, values_in
from vlmkernels.rewards.answers.only import only

_BOX_KEYS = ("bbox_2d", "bbox", "box", "Position", "boxes", "bboxes")
_CORNER_KEYS = (("x1", "y1", "x2", "y2"), ("xmin", "ymin", "xmax", "ymax"))
_POINT_KEYS = ("point_2d", "point")
_LABEL_KEYS = ("label", "category", "class", "name", "class_name", "category_name", "text_content", "labels")
_SCORE_KEYS = ("score", "confidence", "Confidence", "scores")


class Boxes(NamedTuple):
    """The boxes of an answer or of a reference.

    Attributes:
        boxes: (n, 4) fp64, each box x1, y1, x2, y2. In an answer, boxes may be without area; in a reference they are not.
        labels: the label of each box in lower case, or None.
        scores: the confidence of each box, or None.
    """

    boxes: np.ndarray
    labels: list[str | None]
    scores: list[float | None]


# Values of datasets and of JSON


def _pick(row: dict[str, Any], keys: Sequence[str]) -> Any:
    """Return the value of the first of ``keys`` that a row has. Arrow fills in keys that only other rows have, with None."""
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _column(rows: Sequence[dict[str, Any]], keys: Sequence[str], names: set[str]) -> list[Any]:
    """Return ``_pick(row, keys)`` of all rows, which together have the keys ``names``."""
    used = [key for key in keys if key in names]
    return [row.get(used[0]) for row in rows] if len(used) == 1 else [_pick(row, used) for row in rows]


def _plain(value: Any) -> Any:
    """Convert an array, a tensor or a list of them to lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (list, tuple)) and any(hasattr(item, "tolist") for item in value):
        return [_plain(item) for item in value]
    return value


def _is_numbers(value: object, count: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == count and all(type(v) in (int, float) for v in value)


def _label(value: Any) -> str | None:
    """Normalize a label. None, NaN and empty texts are no label."""
    if isinstance(value, str):
        return value.strip().lower() or None
    value = _plain(value)
    if value is None or value != value:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"must have labels that are texts, got {value!r:.80}")
    return str(value)


def _corners(row: dict[str, Any], box: Any) -> Any:
    """Return the four numbers of a row, whose box is under a key or which has a key for each number."""
    corners = row if box is None else box
    if not isinstance(corners, dict):
        return box if isinstance(box, list) else _plain(box)
    found = [[corners[key] for key in keys] for keys in _CORNER_KEYS if all(corners.get(key) is not None for key in keys)]
    if len(found) != 1:
        raise ValueError(f"must have {' or '.join(_BOX_KEYS[:4])}, or {', '.join(_CORNER_KEYS[0])}, got {row!r:.80}")
    return _plain(found[0])


def _check_box_keys(rows: Sequence[dict[str, Any]], names: set[str]) -> None:
    used = [key for key in _BOX_KEYS if key in names]
    if len(used) > 1 and any(sum(row.get(key) is not None for key in used) > 1 for row in rows):
        raise ValueError(f"must have one of {', '.join(used)}, got {rows!r:.80}")


def _columns(row: dict[str, Any], boxes: Sequence[Any]) -> tuple[Sequence[Any], list, list]:
    """Return the boxes, labels and scores of a dict of lists, as ``datasets`` stores a list of dicts."""
    columns = [_plain(_pick(row, keys)) for keys in (_LABEL_KEYS, _SCORE_KEYS)]
    columns = [[column] * len(boxes) if column is None or isinstance(column, str) else column for column in columns]
    if not all(isinstance(column, (list, tuple)) and len(column) == len(boxes) for column in columns):
        raise ValueError(f"must have one label and one score per box, got {row!r:.80}")
    return boxes, *columns


def _fields(rows: Any) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """Return the boxes, labels and scores of a value."""
    rows = _plain(rows)
    if isinstance(rows, dict):
        _check_box_keys([rows], set(rows))
        boxes = _plain(_corners(rows, _pick(rows, _BOX_KEYS)))
        if isinstance(boxes, (list, tuple)) and not _is_numbers(boxes, 4) and all(isinstance(b, (list, tuple)) for b in boxes):
            return _columns(rows, boxes)
    rows = [rows] if _is_numbers(rows, 4) or isinstance(rows, dict) else rows
    if not isinstance(rows, (list, tuple)):
        raise ValueError(f"must be boxes (x1, y1, x2, y2), got {rows!r:.80}")
    if not any(isinstance(row, dict) for row in rows):
        return rows, [None] * len(rows), [None] * len(rows)
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"must be boxes or dicts with boxes, but not both, got {rows!r:.80}")
    names = set().union(*rows)
    _check_box_keys(rows, names)
    boxes, labels, scores = (_column(rows, keys, names) for keys in (_BOX_KEYS, _LABEL_KEYS, _SCORE_KEYS))
    return list(map(_corners, rows, boxes)), labels, scores


def _convert(value: Any) -> Boxes:
    """Convert a value that is not a text; see ``as_boxes``. Boxes may be without area."""
    boxes, labels, scores = _fields(value)
    try:
        corners = np.array(boxes, dtype=np.float64) if len(boxes) else np.empty((0, 4))
        confidences = [None if score is None else float(score) for score in scores]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"must be boxes of 4 numbers with scores that are numbers, got {value!r:.80}") from error
    if corners.shape != (len(boxes), 4):
        raise ValueError(f"must be boxes of 4 numbers, got {boxes!r:.80}")
    if not np.isfinite(corners).all():
        raise ValueError(f"must have finite boxes with x1 < x2 and y1 < y2, got {corners.tolist()!r:.80}")
    if not all(score is None or math.isfinite(score) for score in confidences):
        raise ValueError(f"must have finite scores, got {scores!r:.80}")
    return Boxes(corners, [_label(label) for label in labels], confidences)


def as_boxes(value: object) -> Boxes:
    """Convert a reference to ``Boxes``.

    Args:
        value: a box, a dict, a list of boxes or dicts, an array or tensor (n, 4), a text that ``parse_boxes`` reads, or
            ``Boxes``. A dict has the box under ``bbox_2d``, ``bbox``, ``box`` or ``Position``, or has the keys ``x1``, ``y1``,
            ``x2``, ``y2`` (or ``xmin``, ...). Its label is the first of ``label``, ``category``, ``class`` and ``name``, and
            its confidence ``score`` or ``confidence``; both are optional. A dict of lists has a list under each key. None
            under a key, which Arrow fills in, is the same as no key.

    Raises:
        ValueError: the value has another form, a box is not finite or has no area, or a score is not finite.
    """
    if isinstance(value, Boxes):
        return value
    boxes = parse_boxes(value) if isinstance(value, str) else _convert(value)
    if boxes is None:
        raise ValueError(f"must be boxes (x1, y1, x2, y2), got {value!r:.80}")
    wrong = ~(boxes.boxes[:, :2] < boxes.boxes[:, 2:]).all(1)
    if wrong.any():
        raise ValueError(f"must have finite boxes with x1 < x2 and y1 < y2, got {boxes.boxes[wrong][0].tolist()}")
    return boxes


# Answers

# The markup of Qwen2-VL and Qwen-VL, InternVL, GLM-4.1V and DeepSeek-VL2. Decoding may have removed it.
_MARKUP = {
    "<|object_ref_start|>": "<ref>",
    "<|object_ref_end|>": "</ref>",
    "<|ref|>": "<ref>",
    "<|/ref|>": "</ref>",
    **dict.fromkeys(("<|box_start|>", "<|begin_of_box|>", "<|det|>", "<box>"), ""),
    **dict.fromkeys(("<|box_end|>", "<|end_of_box|>", "<|/det|>", "</box>"), ""),
    **dict.fromkeys(("```json", "```python", "```"), "\n"),
}
_TAGS = re.compile("|".join(map(re.escape, _MARKUP)))
_REFERRED = re.compile(r"<ref>([^<]*)</ref>")
_LOCATED = re.compile(r"\s*<loc(\d{4})><loc(\d{4})><loc(\d{4})><loc(\d{4})>\s*([^<>;]*?)\s*")  # PaliGemma: y1, x1, y2, x2
_NOTHING = re.compile(
    r"(?:there (?:are|is) |i (?:see|found|detected) |found |detected )?"
    r"(?:none|no (?:such |matching |visible )?(?:objects?|boxes|box|bounding boxes|detections?|instances?|targets?)"
    r"(?: (?:is |are |was |were )?(?:found|detected|visible|present))?)"
    r"(?: in (?:the|this) (?:image|picture|photo))?"
)
# Words that may stand beside boxes without being their label.
_PLAIN_WORDS = frozenset({
    "a", "an", "the", "this", "that", "it", "its", "is", "are", "was", "were", "be", "at", "in", "on", "of", "to",
    "for", "from", "with", "and", "one", "i", "we", "here", "there", "below", "as", "follows", "following", "located",
    "found", "find", "see", "detected", "detections", "detection", "box", "boxes", "bounding", "bbox", "bboxes",
    "coordinate", "coordinates", "position", "positions", "location", "locations", "region", "regions", "area",
    "object", "objects", "target", "targets", "result", "results", "answer", "final", "output", "response", "image",
    "picture", "pixel", "pixels", "format", "json", "sure", "x1", "y1", "x2", "y2",
})  # fmt: skip
_COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_WORDS = re.compile(r"[^\W_]+(?:['’-]\w+)*")
_ENUMERATION = re.compile(r"(?:^|(?<=\s))\d{1,2}[.):](?=\s|$)")
_MARKS = " \t\n,;.*•-–_`\"'|#>"
_LABEL = re.compile(r"[^\W\d_]+(?:[ '’/-][^\W\d_]+){0,4}")


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORDS.findall(_ENUMERATION.sub("", text))]


def _is_plain(text: str, count: int = 0) -> bool:
    """Whether a text has no words that could be a label, and no number but the ``count`` of the boxes."""
    return _PLAIN_WORDS.union((str(count), *_COUNTS[count : count + 1])).issuperset(_words(text))


def _label_before(text: str, adjoins: bool) -> str | None:
    """Return the label that a text before a box ends with: ``cat:``, or ``cat`` if it ``adjoins`` the box."""
    before, _, line = _ENUMERATION.sub("", text).strip(_MARKS).rpartition("\n")
    label = line.strip(_MARKS)
    if not adjoins and not label.endswith((":", "：")):
        return None
    label = label.rstrip(":：").strip(_MARKS).removeprefix("and ")
    is_label = _LABEL.fullmatch(label) and _PLAIN_WORDS.isdisjoint(_words(label)) and _is_plain(before)
    return label.lower() if is_label else None


def _join(parts: Iterable[Boxes]) -> Boxes:
    corners, labels, scores = zip(*parts, strict=True)
    return Boxes(np.concatenate(corners), list(chain(*labels)), list(chain(*scores)))


def _labelled(boxes: Boxes, label: str | None) -> Boxes:
    return boxes._replace(labels=[label] * len(boxes.labels))


def _hides_label(found: Found) -> bool:
    """Whether a dict has no label, but a text under another key."""
    rows = found.value if isinstance(found.value, (list, tuple)) else [found.value]
    rows = [row for row in rows if isinstance(row, dict)]
    labels = _column(rows, _LABEL_KEYS, set().union(*rows))
    unnamed = [row for row, label in zip(rows, labels, strict=True) if label is None]
    return any(isinstance(value, str) for row in unnamed for value in row.values())


def _untagged(text: str, labels: bool) -> Boxes | None:
    """Parse boxes in JSON, literals and tuples of numbers; see ``_parse``."""
    found = values_in(text)
    if not found or (len(found) > 1 and any(isinstance(v.value, list) and not _is_numbers(v.value, 4) for v in found)):
        return None
    ends = [0, *(value.end for value in found)]
    between = [text[end : value.start] for end, value in zip(ends, found, strict=False)]
    after = text[ends[-1] :]
    if re.search(r"[\[\]{}]", "".join([*between, after])):
        return None
    try:
        parts = [_convert(value.value) for value in found]
    except ValueError:
        return None
    boxes = parts[0] if len(parts) == 1 else _join(parts)
    if not labels:
        return boxes
    if any(map(_hides_label, found)):
        return None
    named = bool(boxes.labels) and None not in boxes.labels
    if all(_is_plain(words, len(boxes.labels)) for words in (between[1:] if named else [*between, after])):
        return boxes
    names = [_label_before(b, text[v.start] == "(" and b[-1:].isalpha()) for b, v in zip(between, found, strict=True)]
    if None in names or any(boxes.labels) or not _is_plain(after):
        return None
    return _join(map(_labelled, parts, names))


def _referred(text: str, labels: bool) -> Boxes | None:
    """Parse ``<ref>label</ref>`` elements, each with the boxes after it."""
    before, *rest = _REFERRED.split(text)
    parts = [None if "ref>" in part else _untagged(part, False) for part in rest[1::2]]
    if not parts or values_in(before) != [] or any(part is None or any(part.labels) for part in parts):
        return None
    return _join(_labelled(part, _label(name)) for part, name in zip(parts, rest[::2], strict=True) if part is not None)


def _located(text: str) -> Boxes | None:
    """Parse PaliGemma's ``<loc0000><loc0000><loc0000><loc0000> label ; ...``."""
    found = [_LOCATED.fullmatch(part) for part in text.split(";") if part.strip()]
    rows = [match.groups() for match in found if match]
    if not rows or None in found:
        return None
    return _convert([{"box": [float(x1), float(y1), float(x2), float(y2)], "label": name} for y1, x1, y2, x2, name in rows])


def _parse(text: str, labels: bool) -> Boxes | None:
    """Parse boxes. Returns None if some cannot be read or, with ``labels``, if words beside them could be their labels."""
    if "<" in text or "`" in text:
        text = _TAGS.sub(lambda tag: _MARKUP[tag[0]], text)
    text = text.strip()
    if len(text) < 100 and _NOTHING.fullmatch(" ".join(_words(text))) and not re.search(r"[\[\]{}]", text.replace("[]", "")):
        return _convert([])
    if "<loc" in text:
        return _located(text)
    return _referred(text, labels) if "<ref>" in text else _untagged(text, labels)


def parse_boxes(text: str) -> Boxes | None:
    """Parse the boxes of an answer.

    Boxes are read from JSON or a Python literal (also within a code block or between sentences, or one value per line), from
    lists of four numbers and pairs ``(x1, y1), (x2, y2)`` in running text, and from the markup of Qwen2-VL, InternVL, GLM-4.1V,
    DeepSeek-VL2 and PaliGemma, with or without its special tokens. Labels are read from dicts and markup, or before a box
    (``cat: [0, 0, 9, 9]``). "[]", "none" and sentences such as "There are no objects." mean no boxes.

    Returns None if the text has no boxes, if it was cut off or is ambiguous, if words beside the boxes could be labels that
    cannot be assigned, or if a box is not finite. A box without area is kept, and matches no other box.
    """
    return _parse(text, labels=True)


def parse_box(text: str) -> tuple[float, float, float, float] | None:
    """Parse the only box in a text, whatever its label; see ``parse_boxes``. Returns None for a box without area."""
    found = _parse(text, labels=False)
    box = None if found is None else only(list(map(tuple, found.boxes.tolist())))
    return box if box is not None and box[0] < box[2] and box[1] < box[3] else None


_SEVERAL = re.compile(rf"{FOUR}|\[\s*{NUMBER}(?:\s*,\s*{NUMBER}){{3}}\s*\]|{TWO}\s*,?\s*{TWO}")


def boxes_in(text: str) -> list[tuple[float, ...]]:
    """Return the lists of four numbers, and the pairs of two, in a running text."""
    return [tuple(map(float, re.findall(NUMBER, found))) for found in _SEVERAL.findall(text)]


# Points

_MOLMO = re.compile(r"<points?\s([^<>]*)>")
_ATTRIBUTE = re.compile(r"""(\w+)\s*=\s*(?:"([^"]*)"|'([^']*)')""")
_POINT = re.compile(rf"{TWO}|\[\s*{NUMBER}\s*,\s*{NUMBER}\s*\]")
_OTHER_LIST = re.compile(rf"[\[(]\s*{NUMBER}\s*,")


def _molmo_points(elements: list[str]) -> list[tuple[float, float]]:
    """Return the points in the attributes of elements such as ``<point x="1" y="2" alt="a">`` and ``<points x1="1" ...>``."""
    points = []
    for attributes in elements:
        fields = {name: double or single for name, double, single in _ATTRIBUTE.findall(attributes)}
        names = [name for name in fields if re.fullmatch(r"x\d*", name)]
        points += [(float(fields[name]), float(fields["y" + name[1:]])) for name in names]
    return points


def _points(text: str) -> list[tuple[float, float]]:
    """Return the points in a text. Raises ValueError or KeyError if some cannot be read."""
    if elements := _MOLMO.findall(text):
        return _molmo_points(elements)
    found = values_in(text)
    if found and len(found) == 1 and isinstance(row := _only_row(found[0].value), dict):
        pair = _pick(row, _POINT_KEYS)
        pair = [row.get("x"), row.get("y")] if pair is None else pair
        if _is_numbers(pair, 2):
            return [(float(pair[0]), float(pair[1]))]
    points = [tuple(map(float, re.findall(NUMBER, pair))) for pair in _POINT.findall(text)]
    rest = _POINT.sub("", text)
    if points and (not is_balanced(rest) or _OTHER_LIST.search(rest)):
        raise ValueError("other lists of numbers, or brackets that are not closed")
    return [(x, y) for x, y in points]


def _only_row(value: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value


def parse_point(text: str) -> tuple[float, float] | None:
    """Parse the only point ``(x, y)`` in a text, also in Molmo's markup, or return the center of its only box."""
    is_box = "<box>" in text or "<|box_start|>" in text
    try:
        point = only(_points(text))
        if point is None and (is_box or not _POINT.search(text)) and (box := parse_box(text)) is not None:
            point = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    except (ValueError, KeyError, OverflowError):
        return None
    return point if point is not None and all(abs(v) <= sys.float_info.max for v in point) else None
