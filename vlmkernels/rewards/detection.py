"""Score sets of boxes against sets of reference boxes: boxes are matched, and each extra or missing box lowers the score.

Samples are scored in chunks, with boxes padded to (B, P, 4) and (B, G, 4). Samples with similar numbers of boxes form a chunk,
so that one answer with a thousand boxes does not force as much padding on the others. If the boxes of a reference have labels,
a predicted box matches only boxes with the same label, and a predicted box without a label matches none. A predicted box
without area matches none either, and lowers the score like any other box that is not in the reference.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from vlmkernels.ops.checks import require_one_of, require_positive
from vlmkernels.rewards.answers import Boxes, as_boxes
from vlmkernels.rewards.batch import pure, third_party
from vlmkernels.rewards.boxes import box_iou

CHUNK = 2**18  # maximum number of pairs of boxes in a chunk, padding included
IOU_THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10))  # the thresholds of COCO
RECALLS = torch.from_numpy(np.linspace(0, 1, 101))  # bitwise equal to pycocotools' recalls; torch.linspace rounds differently


class Pairs(NamedTuple):
    """The padded pairs of P predicted and G reference boxes in B samples.

    Attributes:
        iou: (B, P, G) fp64; -1 for padding and for pairs that must not match because their labels differ.
        labels: (B, P) int64, label ids of the predicted boxes. The labels in the sample's reference have the ids 0, 1, ...;
            other labels and padding are negative.
        reference_labels: (B, G) int64, label ids of the reference boxes; negative for padding.
        num_predicted, num_references: (B,) int64, numbers of boxes without padding.
    """

    iou: torch.Tensor
    labels: torch.Tensor
    reference_labels: torch.Tensor
    num_predicted: torch.Tensor
    num_references: torch.Tensor

    @property
    def same_label(self) -> torch.Tensor:
        """(B, P, G) bool, whether the labels are equal."""
        return self.labels[:, :, None] == self.reference_labels[:, None]


def _in_order(boxes: Boxes) -> Boxes:
    """Sort boxes by confidence, highest first. Boxes without a score come first."""
    if boxes.scores.count(None) == len(boxes.scores):
        return boxes
    key = [-math.inf if score is None else -score for score in boxes.scores]
    order = sorted(range(len(key)), key=key.__getitem__)
    return Boxes(boxes.boxes[order], [boxes.labels[i] for i in order], [boxes.scores[i] for i in order])


def _padded(values: np.ndarray, counts: np.ndarray, fill: float) -> torch.Tensor:
    """Pad B lists, concatenated along dim 0 with lengths ``counts`` (B,), to (B, max(counts), ...) with ``fill``."""
    out = np.full((len(counts), max(1, counts.max()), *values.shape[1:]), fill, dtype=values.dtype)
    out[np.arange(out.shape[1]) < counts[:, None]] = values
    return torch.from_numpy(out)


def _numbered(predictions: list[Boxes], references: list[Boxes]) -> tuple[np.ndarray, np.ndarray]:
    """Convert the labels of predictions and references to ids, which count from 0 in each reference.

    A label that the reference does not have gets -1. If the reference has no labels, all ids of the sample are 0.
    """
    ours, theirs = [], []
    for p, r in zip(predictions, references, strict=True):
        if r.labels.count(None) == len(r.labels):
            ours += [0] * len(p.labels)
            theirs += [0] * len(r.labels)
        else:
            numbers = {label: number for number, label in enumerate(dict.fromkeys(r.labels))}
            ours += [numbers.get(label, -1) for label in p.labels]
            theirs += [numbers[label] for label in r.labels]
    return np.array(ours, dtype=np.int64), np.array(theirs, dtype=np.int64)


def _pairs(predictions: list[Boxes], references: list[Boxes], by_label: bool = True) -> Pairs:
    """Compute the IoU of all pairs. ``by_label``: set the IoU of boxes with different labels to -1."""
    sides = predictions, references
    counts = [np.array([len(row.boxes) for row in rows]) for rows in sides]
    corners = [_padded(np.concatenate([row.boxes for row in rows]), n, 0.0) for rows, n in zip(sides, counts, strict=True)]
    labels = [_padded(own, n, pad) for own, n, pad in zip(_numbered(*sides), counts, (-2, -3), strict=True)]
    iou = box_iou(*corners)
    pairs = Pairs(iou, *labels, *map(torch.from_numpy, counts))
    kept = pairs.same_label if by_label else (labels[0] != -2)[:, :, None] & (labels[1] != -3)[:, None]
    return pairs._replace(iou=iou.masked_fill(~kept, -1.0))


def _chunks(predictions: list[Boxes], references: list[Boxes]) -> Iterator[list[int]]:
    """Yield chunks of sample indices with at most CHUNK pairs of boxes, padding included. Samples with few boxes come first."""
    sizes = [(len(p.boxes), len(r.boxes)) for p, r in zip(predictions, references, strict=True)]
    chunk: list[int] = []
    rows, columns = 1, 1
    for index in sorted(range(len(sizes)), key=lambda i: sizes[i]):
        rows, columns = max(rows, sizes[index][0]), max(columns, sizes[index][1])
        if chunk and (len(chunk) + 1) * rows * columns > CHUNK:
            yield chunk
            chunk, (rows, columns) = [], (max(1, n) for n in sizes[index])
        chunk.append(index)
    if chunk:
        yield chunk


def _scored(
    predictions: list[Boxes], references: list[Boxes], score: Callable[[list[Boxes], list[Boxes]], torch.Tensor]
) -> torch.Tensor:
    """Compute ``score(predictions, references)`` in chunks. The scores are in the order of the samples."""
    scores = torch.empty(len(predictions), dtype=torch.float64)
    for chunk in _chunks(predictions, references):
        scores[chunk] = score([predictions[i] for i in chunk], [references[i] for i in chunk])
    return scores


def _empty(pairs: Pairs, score: torch.Tensor) -> torch.Tensor:
    """Set the score of samples without predicted or reference boxes: 1 if both are missing, 0 if only one is."""
    no_prediction, no_reference = pairs.num_predicted == 0, pairs.num_references == 0
    return torch.where(no_prediction & no_reference, 1.0, score.masked_fill(no_prediction | no_reference, 0.0))


# A matching returns the index of the matched reference box for each predicted box, (B, P) int64; -1 for no match. Boxes that do
# not overlap are never matched.


def match_confidence(pairs: Pairs, thresholds: Sequence[float]) -> torch.Tensor:
    """Match each predicted box, in the given order, with the unmatched reference box of greatest IoU.

    Args:
        pairs: the predicted boxes must be sorted by confidence, highest first.
        thresholds: T minimum IoUs of a match.

    Returns:
        (B, T, P) int64.
    """
    minimum = torch.tensor(thresholds, dtype=torch.float64)
    batch, num_predicted, num_references = pairs.iou.shape
    taken = torch.zeros(batch, len(minimum), num_references, dtype=torch.bool)
    matched = torch.full((batch, len(minimum), num_predicted), -1)
    for p in range(num_predicted):
        best, index = pairs.iou[:, None, p].masked_fill(taken, 0.0).max(-1, keepdim=True)
        hit = (best >= minimum[:, None]) & (best > 0)
        matched[:, :, p] = torch.where(hit, index, -1).squeeze(2)
        taken.scatter_(2, index, taken.gather(2, index) | hit)
    return matched


def match_greedy(pairs: Pairs, threshold: float) -> torch.Tensor:
    """Match the pair with the greatest IoU, then repeat with the remaining boxes until no IoU reaches the threshold."""
    batch, num_predicted, num_references = pairs.iou.shape
    left, matched = pairs.iou.clone(), torch.full((batch, num_predicted), -1)
    samples = torch.arange(batch)
    for _ in range(min(num_predicted, num_references)):
        best, index = left.flatten(1).max(1)
        hit = (best >= threshold) & (best > 0)
        if not hit.any():
            break
        row, column = index // num_references, index % num_references
        matched[samples[hit], row[hit]] = column[hit]
        left[samples, row], left[samples, :, column] = -1.0, -1.0
    return matched


def match_hungarian(pairs: Pairs, threshold: float) -> torch.Tensor:
    """Compute the assignment with the greatest total IoU with scipy, then drop pairs below the threshold."""
    optimize = third_party("scipy.optimize", "matching='hungarian'")
    matched, ious = torch.full(pairs.iou.shape[:2], -1), pairs.iou.clamp(min=0).numpy()
    for out, iou, p, g in zip(matched.numpy(), ious, pairs.num_predicted.tolist(), pairs.num_references.tolist(), strict=True):
        rows, columns = optimize.linear_sum_assignment(iou[:p, :g], maximize=True)
        out[rows] = columns
    overlap = _of_matched(pairs.iou, matched)
    return torch.where((overlap >= threshold) & (overlap > 0), matched, -1)


MATCHINGS = {
    "confidence": lambda pairs, threshold: match_confidence(pairs, [threshold]).squeeze(1),
    "greedy": match_greedy,
    "hungarian": match_hungarian,
}


def _of_matched(values: torch.Tensor, matched: torch.Tensor) -> torch.Tensor:
    """Gather the entries of ``values`` (B, P, G) at the matched pairs, (B, P); 0 for boxes without a match."""
    return values.gather(2, matched.clamp(min=0).unsqueeze(2)).squeeze(2).masked_fill(matched < 0, 0)


@pure(as_boxes)
def matched_iou(
    predictions: list[Boxes],
    references: list[Boxes],
    *,
    matching: str = "hungarian",
    threshold: float = 0.5,
    power: float = 1.0,
) -> torch.Tensor:
    """``sum(IoU^power of the matched pairs) / max(number of predicted boxes, number of reference boxes)``.

    The score is 1 if both sets are empty. ``matching="confidence"`` computes the reward of Visual-RFT (2503.01785), except that
    Visual-RFT first drops exact duplicates and requires an IoU > 0.5 rather than >= 0.5. ``matching="hungarian"`` with
    ``power=2`` scores overlap like Perception-R1 (2504.07954).

    Args:
        predictions: results of ``answers.parse_boxes``.
        references: values that ``answers.as_boxes`` accepts.
        matching: "hungarian" (greatest total IoU), "greedy" (best pair first) or "confidence" (most confident box first).
        threshold: minimum IoU of a match.
        power: exponent of the IoU.
    """
    require_one_of("matching", matching, MATCHINGS)
    require_positive("power", power)
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")

    def score(predictions: list[Boxes], references: list[Boxes]) -> torch.Tensor:
        pairs = _pairs([_in_order(p) for p in predictions], references)
        total = (_of_matched(pairs.iou, MATCHINGS[matching](pairs, threshold)) ** power).sum(1)
        return _empty(pairs, total / torch.maximum(pairs.num_predicted, pairs.num_references).clamp(min=1))

    return _scored(predictions, references, score)


@pure(as_boxes)
def weighted_match(
    predictions: list[Boxes],
    references: list[Boxes],
    *,
    threshold: float = 0.5,
    position: float = 0.7,
    label: float = 0.0,
    completeness: float = 0.3,
) -> torch.Tensor:
    """VLM-R1's weighted mean of position, label and completeness over greedy matches, which are made without labels.

    Position is the sum of the IoUs of matches with equal labels, divided by the number of reference boxes. Label is the number
    of matches with equal labels, divided by the number of reference boxes. Completeness is the mean of precision and recall of
    all matches. Labels are compared in lower case. The IoU is torchvision's; VLM-R1's is 0 where boxes overlap by one pixel or
    less.

    Args:
        predictions, references: see ``matched_iou``.
        threshold: minimum IoU of a match.
        position, label, completeness: weights, >= 0.

    Source: https://arxiv.org/abs/2504.07615, https://github.com/om-ai-lab/VLM-R1
    """
    weights = (position, label, completeness)
    if min(weights) < 0 or sum(weights) == 0:
        raise ValueError(f"position, label, completeness must be >= 0 and not all 0, got {weights}")

    def score(predictions: list[Boxes], references: list[Boxes]) -> torch.Tensor:
        pairs = _pairs(predictions, references, by_label=False)
        matched = match_greedy(pairs, threshold)
        agree, hits = _of_matched(pairs.same_label, matched), (matched >= 0).sum(1).double()
        num_predicted, num_references = pairs.num_predicted.clamp(min=1), pairs.num_references.clamp(min=1)
        overlap = (_of_matched(pairs.iou, matched) * agree).sum(1)
        precision, recall = hits / num_predicted, hits / num_references
        parts = overlap / num_references, agree.double().sum(1) / num_references, (recall + precision) / 2
        total = sum((w * part for w, part in zip(weights, parts, strict=True)), torch.zeros(()))
        return _empty(pairs, total / sum(weights))

    return _scored(predictions, references, score)


@pure(as_boxes)
def mean_ap(
    predictions: list[Boxes],
    references: list[Boxes],
    *,
    thresholds: Sequence[float] = IOU_THRESHOLDS,
    over_prediction_penalty: bool = True,
) -> torch.Tensor:
    """COCO's mean average precision of one image, times ``min(1, reference boxes / predicted boxes)`` as in VLM-R1.

    For each label of the reference, predictions are matched in order of confidence at each IoU threshold, and precision is
    interpolated at 101 recalls. The result is the mean over thresholds and labels. It equals pycocotools', except that
    pycocotools keeps at most 100 predictions and ignores a predicted box of negative width or height. The penalty is needed
    because boxes ranked after the last match do not lower mAP, so a model could append any number of boxes at no cost. Labels
    are compared in lower case; VLM-R1 compares them as they are written.

    Args:
        predictions, references: see ``matched_iou``.
        thresholds: IoU thresholds, in (0, 1].
        over_prediction_penalty: multiply by ``min(1, reference boxes / predicted boxes)``.

    Source: https://cocodataset.org/#detection-eval; https://arxiv.org/abs/2504.07615
    """
    if len(thresholds) == 0 or not all(0 < t <= 1 for t in thresholds):
        raise ValueError(f"thresholds must be in (0, 1], got {list(thresholds)}")

    def score(predictions: list[Boxes], references: list[Boxes]) -> torch.Tensor:
        pairs = _pairs([_in_order(p) for p in predictions], references)
        hit = match_confidence(pairs, thresholds) >= 0
        total = torch.zeros(len(predictions), dtype=torch.float64)
        for label in range(int(pairs.reference_labels.max()) + 1):
            own = (pairs.labels == label)[:, None]
            num_references = (pairs.reference_labels == label).sum(1)[:, None, None]
            hits, rank = (hit & own).cumsum(-1), own.cumsum(-1)
            # Interpolated precision: the maximum over this recall and all higher recalls.
            precision = (hits.double() / rank.clamp(min=1)).flip(-1).cummax(-1).values.flip(-1)
            # How many of the 101 recalls have been reached. Each hit adds its precision once per recall that it newly reaches.
            recall = hits.double() / num_references.clamp(min=1)
            passed = torch.searchsorted(RECALLS, recall, right=True).masked_fill(hits == 0, 0)
            total += (precision * passed.diff(prepend=torch.zeros_like(passed[..., :1]))).sum(-1).mean(1) / len(RECALLS)
        scores = total / (pairs.reference_labels.max(1).values + 1).clamp(min=1)
        if over_prediction_penalty:
            scores *= (pairs.num_references.double() / pairs.num_predicted.clamp(min=1)).clamp(max=1)
        return _empty(pairs, scores)

    return _scored(predictions, references, score)
