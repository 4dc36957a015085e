"""Score one box or point against one reference box, and convert between coordinate frames. IoU is computed by torchvision."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike

from vlmkernels.ops.checks import require_one_of, require_positive
from vlmkernels.rewards.answers import as_boxes
from vlmkernels.rewards.batch import pure, third_party

# Coordinate frame -> the unit of its coordinates.
FRAMES = {
    "original": "pixels of the image in the dataset",
    "resized": "pixels of the image after the processor has resized it (Qwen2-VL, Qwen2.5-VL)",
    "0-1": "fractions of the image's width and height",
    "0-100": "percent of the image's width and height (Molmo)",
    "0-1000": "thousandths of the image's width and height (Qwen-VL, Qwen3-VL, InternVL)",
    "0-1024": "1024ths of the image's width and height (PaliGemma)",
}
Box = tuple[float, float, float, float]  # x1, y1, x2, y2
_FIXED = {"0-1": 1.0, "0-100": 100.0, "0-1000": 1000.0, "0-1024": 1024.0}


def frame_sizes(frame: str, original: ArrayLike | None, resized: ArrayLike | None) -> np.ndarray | None:
    """Return the width and height of N images in the unit of a frame.

    Args:
        frame: a key of FRAMES.
        original, resized: (N, 2), width and height in pixels of the images in the dataset and after resizing; or None.

    Returns:
        (N, 2) fp64, or (1, 2) for a frame of fixed size. None if the sizes of the frame are not given.
    """
    require_one_of("frame", frame, FRAMES)
    if frame in _FIXED:
        return np.full((1, 2), _FIXED[frame])
    sizes = original if frame == "original" else resized
    return None if sizes is None else np.asarray(sizes, dtype=np.float64)


def convert_frame(
    points: np.ndarray,
    source: str,
    target: str,
    *,
    original: ArrayLike | None = None,
    resized: ArrayLike | None = None,
) -> np.ndarray:
    """Convert coordinates from one frame to another: ``points / size(source) * size(target)``.

    Args:
        points: (N, 2) or (N, 4), pairs of x and y.
        source, target: keys of FRAMES.
        original, resized: (N, 2), width and height in pixels of each row's image. Required if the frame of that name is used.

    Returns:
        fp64, the shape of ``points``; ``points`` unchanged if the frames are equal.

    Raises:
        ValueError: a frame is unknown, or its sizes are not given.
    """
    points = np.asarray(points, dtype=np.float64)
    if source == target:
        require_one_of("frame", source, FRAMES)
        return points
    sizes = []
    for frame in (source, target):
        size = frame_sizes(frame, original, resized)
        if size is None:
            raise ValueError(f"{frame} sizes must be given to convert from the {source} frame to the {target} frame, got None")
        sizes.append(size)
    sources, targets = (np.tile(size, points.shape[1] // 2) for size in sizes)
    return np.asarray(points / sources * targets)


def inside_frame(points: np.ndarray, size: np.ndarray | None, slack: float = 0.01) -> np.ndarray:
    """Whether all coordinates of each row lie in ``[-slack, 1 + slack]`` times the size of the frame.

    Args:
        points: (N, 2) or (N, 4).
        size: the result of ``frame_sizes``. Rows whose size is unknown (None or NaN) count as inside.
        slack: tolerance, as a fraction of the size.

    Returns:
        (N,) bool.
    """
    if size is None:
        return np.ones(len(points), dtype=bool)
    shares = points / np.tile(size, points.shape[1] // 2)
    return np.asarray(~((shares < -slack) | (shares > 1 + slack)).any(axis=1))


def _box(value: object) -> Box:
    boxes = as_boxes(value).boxes
    if len(boxes) != 1:
        raise ValueError(f"must be one box (x1, y1, x2, y2), got {len(boxes)}")
    x1, y1, x2, y2 = boxes[0].tolist()
    return x1, y1, x2, y2


def _pairs(predictions: Sequence[Box], references: Sequence[Box]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return predictions and references as (N, 1, 4) tensors, for batched ops on sets of boxes."""
    p, r = (torch.tensor(boxes, dtype=torch.float64).view(-1, 1, 4) for boxes in (predictions, references))
    return p, r


def box_iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return torchvision's ``box_iou`` of boxes (..., P, 4) and (..., G, 4), (..., P, G); 0 for boxes without area."""
    ious: torch.Tensor = third_party("torchvision.ops", "a box reward").box_iou(a, b)
    return ious.nan_to_num(nan=0.0)


@pure(_box)
def iou(predictions: Sequence[Box], references: Sequence[Box], *, power: float = 1.0) -> torch.Tensor:
    """IoU of two boxes, raised to ``power``, which is 1 in VLM-R1 (2504.07615) and 2 in Perception-R1 (2504.07954).

    Args:
        predictions, references: N boxes (x1, y1, x2, y2) in the same frame.
        power: exponent, > 0.
    """
    require_positive("power", power)
    return box_iou(*_pairs(predictions, references)).flatten() ** power


@pure(_box)
def giou(predictions: Sequence[Box], references: Sequence[Box]) -> torch.Tensor:
    """Generalized IoU, in (-1, 1], which falls with the distance between boxes that do not overlap.

    Source: https://arxiv.org/abs/1902.09630
    """
    gious: torch.Tensor = third_party("torchvision.ops", "giou").generalized_box_iou(*_pairs(predictions, references))
    return gious.flatten()


@pure(_box)
def point_in_box(predictions: Sequence[tuple[float, float]], references: Sequence[Box]) -> list[float]:
    """1 if a point (x, y) lies in the box or on its border, else 0; for GUI grounding."""
    pairs = zip(predictions, references, strict=True)
    return [float(x1 <= x <= x2 and y1 <= y <= y2) for (x, y), (x1, y1, x2, y2) in pairs]
