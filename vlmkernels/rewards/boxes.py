"""One box or point against one box: overlap, and the frames that coordinates are given in. IoUs by torchvision."""

from collections.abc import Sequence

import numpy as np
import torch

from vlmkernels.ops.checks import require, require_one_of, require_positive
from vlmkernels.rewards.answers import as_boxes
from vlmkernels.rewards.batch import pure, third_party

# What a coordinate counts, by the name of its frame.
FRAMES = {
    "original": "pixels of the image as it is in the dataset",
    "resized": "pixels of the image as the model sees it, after its processor's resize (Qwen2-VL, Qwen2.5-VL)",
    "0-1": "shares of the image's width and height",
    "0-1000": "thousandths of them (Qwen-VL, Qwen3-VL, InternVL)",
}
_FIXED = {"0-1": 1.0, "0-1000": 1000.0}


def frame_sizes(frame: str, original, resized) -> np.ndarray | None:
    """Width and height in the units of a frame, (N, 2) fp64, (1, 2) where they are fixed. None where they are not known.

    Args:
        frame: a key of FRAMES.
        original, resized: (N, 2), width and height of images in pixels, or None.
    """
    require_one_of("frame", frame, FRAMES)
    if frame in _FIXED:
        return np.full((1, 2), _FIXED[frame])
    sizes = original if frame == "original" else resized
    return None if sizes is None else np.asarray(sizes, dtype=np.float64)


def convert_frame(points: np.ndarray, source: str, target: str, *, original=None, resized=None) -> np.ndarray:
    """Coordinates of one frame in another: ``points * size(target) / size(source)``. The one place where frames are converted.

    Args:
        points: (N, 2) or (N, 4): x, y, in pairs.
        source, target: keys of FRAMES.
        original, resized: (N, 2), width and height of each row's image, in pixels; needed by the frames of those names.

    Returns:
        Of the shape of points, fp64; the points themselves where both frames are one.
    """
    points = np.asarray(points, dtype=np.float64)
    if source == target:
        require_one_of("frame", source, FRAMES)
        return points
    sizes = []
    for frame in (source, target):
        size = frame_sizes(frame, original, resized)
        require(size is not None, f"{frame} sizes", f"be given to convert from the frame {source} to {target}", None)
        sizes.append(size)
    return points * np.tile(sizes[1] / sizes[0], points.shape[1] // 2)


def inside_frame(points: np.ndarray, size: np.ndarray | None, slack: float = 0.01) -> np.ndarray:
    """Whether all coordinates lie in ``[-slack, 1 + slack]`` of the frame, (N,) bool; all do where its size is None or NaN,
    not known.

    Args:
        points: (N, 2) or (N, 4).
        size: of ``frame_sizes``.
    """
    if size is None:
        return np.ones(len(points), dtype=bool)
    shares = points / np.tile(size, points.shape[1] // 2)
    return ~((shares < -slack) | (shares > 1 + slack)).any(axis=1)


def _box(value: object) -> tuple[float, float, float, float]:
    boxes = as_boxes(value).boxes
    if len(boxes) != 1:
        raise ValueError(f"must be one box (x1, y1, x2, y2), got {len(boxes)}")
    return tuple(boxes[0].tolist())


def _pairs(predictions: Sequence, references: Sequence) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 1, 4) each: N pairs of one box."""
    return tuple(torch.tensor(boxes, dtype=torch.float64).view(-1, 1, 4) for boxes in (predictions, references))


@pure(_box)
def iou(predictions: Sequence, references: Sequence, *, power: float = 1.0) -> torch.Tensor:
    """Intersection over union of two boxes, to a power: 1 in VLM-R1 (2504.07615), 2 in Perception-R1 (2504.07954).

    Args:
        predictions, references: N boxes (x1, y1, x2, y2), in one frame.
    """
    require_positive("power", power)
    return third_party("torchvision.ops", "iou").box_iou(*_pairs(predictions, references)).flatten() ** power


@pure(_box)
def giou(predictions: Sequence, references: Sequence) -> torch.Tensor:
    """Generalised IoU, in (-1, 1]: boxes that do not meet are told apart by their distance.

    Source: https://arxiv.org/abs/1902.09630
    """
    return third_party("torchvision.ops", "giou").generalized_box_iou(*_pairs(predictions, references)).flatten()


@pure(_box)
def point_in_box(predictions: Sequence, references: Sequence) -> list[float]:
    """1 where a point (x, y) lies in the box, border included, else 0: a click on an element of a screen."""
    pairs = zip(predictions, references, strict=True)
    return [float(x1 <= x <= x2 and y1 <= y <= y2) for (x, y), (x1, y1, x2, y2) in pairs]
