"""How lmms-eval, VLMEvalKit and VLM-R1 read and score boxes; ``HARNESSES`` in ``tasks`` names the source of each.

These functions follow the harnesses in every detail, also where a person would read an answer differently, and therefore do not
use the parsers of ``vlmkernels.rewards``. A box may be without area; its IoU is 0.
"""

import re
from collections.abc import Sequence

from vlmkernels.rewards import boxes
from vlmkernels.rewards.batch import pure

Box = tuple[float, ...]  # x1, y1, x2, y2


def _list_of(number: str, separator: str, space: str = "") -> re.Pattern:
    return re.compile(rf"\[{space}" + separator.join([f"({number})"] * 4) + rf"{space}\]")


def _box(match: re.Match | None) -> Box | None:
    return tuple(map(float, match.groups())) if match else None


_DECIMALS = _list_of(r"-?\d+(?:\.\d+)?", r",\s*", r"\s*")
_INTEGERS = _list_of(r"\d+", r",\s*")
_NUMBER = r"[-+]?(?:\d*\.)?\d+(?:[eE][-+]?\d+)?"
_NUMBERS = _list_of(_NUMBER, r"(?:\s*,\s*|\s+)", r"\s*")


def first_list(answer: str) -> Box | None:
    """Read the first four numbers in square brackets (RefCOCO in lmms-eval). No white space may precede a comma."""
    return _box(_DECIMALS.search(answer))


def last_list_in_braces(answer: str) -> Box | None:
    """Read the last four whole numbers in square brackets between the first ``{`` and the last ``}`` (VLM-R1)."""
    within = answer[answer.find("{") : answer.rfind("}") + 1] if "{" in answer else ""
    return _box(next(reversed(list(_INTEGERS.finditer(within))), None))


def first_numbers(answer: str) -> Box | None:
    """Read the first four numbers in square brackets, or else the first four numbers anywhere (VLMEvalKit)."""
    if box := _box(_NUMBERS.search(answer)):
        return box
    numbers = re.findall(_NUMBER, answer)[:4]
    return tuple(map(float, numbers)) if len(numbers) == 4 else None


def pixels_by_magnitude(box: Box, size: tuple[int, int] | None) -> Box:
    """Convert a box to pixels as VLMEvalKit does, and exchange corners that are in the wrong order.

    Numbers up to 1.5 are fractions of the image, numbers up to 1000 are thousandths, and larger numbers are pixels. The box is
    cut off at the border of the image.

    Args:
        box: x1, y1, x2, y2.
        size: width and height of the image. None: unknown, and the box already is in the frame of the reference.
    """
    if size is not None:
        largest = max(map(abs, box))
        unit = 1 if largest <= 1.5 else 1000
        limits = (*size, *size)
        scaled = box if largest > 1000 else [value / unit * limit for value, limit in zip(box, limits, strict=True)]
        box = tuple(min(max(value, 0), limit) for value, limit in zip(scaled, limits, strict=True))
    (x1, x2), (y1, y2) = sorted(box[::2]), sorted(box[1::2])
    return x1, y1, x2, y2


@pure(boxes.iou.reference)
def iou_of_pixels(predictions: Sequence[Box], references: Sequence[Box]) -> list[float]:
    """VLM-R1's IoU of two boxes, which is 0 if they overlap by at most one pixel in width or height."""
    return [_iou_of_pixels(p, r) for p, r in zip(predictions, references, strict=True)]


def _iou_of_pixels(a: Box, b: Box) -> float:
    # The last pixel of a box is at x2 - 1.
    width, height = (min(a[axis + 2] - 1, b[axis + 2] - 1) - max(a[axis], b[axis]) for axis in (0, 1))
    common = (width + 1) * (height + 1) if width > 0 and height > 0 else 0
    area_a, area_b = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return common / (area_a + area_b - common) if common else 0.0
