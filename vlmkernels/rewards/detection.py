"""Sets of boxes against sets of boxes: matched, then scored so that a box too many costs as much as a box too few.

All samples of a batch are scored together: their boxes are padded into (B, P, 4) and (B, G, 4), in chunks of samples with about
as many boxes, so that one answer of a thousand boxes does not pad the others. Where the boxes of a reference are labelled, a
predicted box matches those of its own label alone, and none where it has no label.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from vlmkernels.ops.checks import require, require_one_of, require_positive
from vlmkernels.rewards.answers import Boxes, as_boxes
from vlmkernels.rewards.batch import pure, third_party

CHUNK = 2**18  # pairs of boxes at a time
IOU_THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10))  # COCO's
RECALLS = torch.from_numpy(np.linspace(0, 1, 101))  # to the bit; torch.linspace rounds otherwise


class Pairs(NamedTuple):
    """B samples of P predicted and G reference boxes, padded.

    iou: (B, P, G) fp64, -1 where either is padding (or their labels differ). predicted, wanted: (B,) int64, how many are no
    padding. labels, wanted_labels: (B, P) and (B, G) int64: numbers of the labels that occur in each reference, from 0;
    negative for others.
    """

    iou: torch.Tensor
    labels: torch.Tensor
    wanted_labels: torch.Tensor
    predicted: torch.Tensor
    wanted: torch.Tensor

    @property
    def same(self) -> torch.Tensor:
        """(B, P, G) bool: labels are equal."""
        return self.labels[:, :, None] == self.wanted_labels[:, None]


def _in_order(boxes: Boxes) -> Boxes:
    """The most confident first; those without a score are certain."""
    if boxes.scores.count(None) == len(boxes.scores):
        return boxes
    key = [-math.inf if score is None else -score for score in boxes.scores]
    order = sorted(range(len(key)), key=key.__getitem__)
    return Boxes(boxes.boxes[order], [boxes.labels[i] for i in order], [boxes.scores[i] for i in order])


def _padded(values: np.ndarray, counts: np.ndarray, fill) -> torch.Tensor:
    """The values of B lists, one after the other, as (B, longest, ...)."""
    out = np.full((len(counts), max(1, counts.max()), *values.shape[1:]), fill, dtype=values.dtype)
    out[np.arange(out.shape[1]) < counts[:, None]] = values
    return torch.from_numpy(out)


def _numbered(predictions: list[Boxes], references: list[Boxes]) -> tuple[np.ndarray, np.ndarray]:
    """Labels as numbers, of predictions and references: each reference's own from 0 on; -1 where it has none such. All 0 where
    no box of the reference is labelled."""
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
    ops = third_party("torchvision.ops", "a reward of boxes")
    sides = predictions, references
    counts = [np.array([len(row.boxes) for row in rows]) for rows in sides]
    corners = [_padded(np.concatenate([row.boxes for row in rows]), n, 0.0) for rows, n in zip(sides, counts, strict=True)]
    labels = [_padded(of, n, pad) for of, n, pad in zip(_numbered(*sides), counts, (-2, -3), strict=True)]
    iou = ops.box_iou(*corners)
    pairs = Pairs(iou, *labels, *map(torch.from_numpy, counts))
    kept = pairs.same if by_label else (labels[0] != -2)[:, :, None] & (labels[1] != -3)[:, None]
    return pairs._replace(iou=iou.masked_fill(~kept, -1.0))


def _chunks(predictions: list[Boxes], references: list[Boxes]) -> Iterator[list[int]]:
    """Indices of samples, those with few boxes first, of at most CHUNK padded pairs."""
    sizes = [(len(p.boxes), len(r.boxes)) for p, r in zip(predictions, references, strict=True)]
    chunk, rows, columns = [], 1, 1
    for index in sorted(range(len(sizes)), key=lambda i: sizes[i]):
        rows, columns = max(rows, sizes[index][0]), max(columns, sizes[index][1])
        if chunk and (len(chunk) + 1) * rows * columns > CHUNK:
            yield chunk
            chunk, (rows, columns) = [], (max(1, n) for n in sizes[index])
        chunk.append(index)
    if chunk:
        yield chunk


def _scored(predictions: list[Boxes], references: list[Boxes], score, **options) -> torch.Tensor:
    """``score(predictions, references)`` chunk by chunk, put back in order."""
    scores = torch.empty(len(predictions), dtype=torch.float64)
    for chunk in _chunks(predictions, references):
        scores[chunk] = score([predictions[i] for i in chunk], [references[i] for i in chunk], **options)
    return scores


def _empty(pairs: Pairs, score: torch.Tensor) -> torch.Tensor:
    """Nothing found where there is nothing: 1. Boxes on one side alone: 0."""
    nothing = (pairs.predicted == 0) & (pairs.wanted == 0)
    return torch.where(nothing, 1.0, score.masked_fill((pairs.predicted == 0) | (pairs.wanted == 0), 0.0))


# Matchings: the index of the reference box that each predicted box is matched to, (B, P) int64, -1 where there is none. Boxes
# that do not meet are never matched.


def match_confidence(pairs: Pairs, thresholds: Sequence[float]) -> torch.Tensor:
    """In order of confidence, each predicted box takes the free reference box that it overlaps most, if by the threshold.

    Returns:
        (B, T, P), for each of T thresholds.
    """
    least = torch.tensor(thresholds, dtype=torch.float64)
    batch, num_predicted, num_wanted = pairs.iou.shape
    taken = torch.zeros(batch, len(least), num_wanted, dtype=torch.bool)
    matched = torch.full((batch, len(least), num_predicted), -1)
    for p in range(num_predicted):
        best, index = pairs.iou[:, None, p].masked_fill(taken, 0.0).max(-1, keepdim=True)
        hit = (best >= least[:, None]) & (best > 0)
        matched[:, :, p] = torch.where(hit, index, -1).squeeze(2)
        taken.scatter_(2, index, taken.gather(2, index) | hit)
    return matched


def match_greedy(pairs: Pairs, threshold: float) -> torch.Tensor:
    """The pair that overlaps most first, then the most of those left, down to the threshold."""
    batch, num_predicted, num_wanted = pairs.iou.shape
    left, matched = pairs.iou.clone(), torch.full((batch, num_predicted), -1)
    samples = torch.arange(batch)
    for _ in range(min(num_predicted, num_wanted)):
        best, index = left.flatten(1).max(1)
        hit = (best >= threshold) & (best > 0)
        if not hit.any():
            break
        row, column = index // num_wanted, index % num_wanted
        matched[samples[hit], row[hit]] = column[hit]
        left[samples, row], left[samples, :, column] = -1.0, -1.0
    return matched


def match_hungarian(pairs: Pairs, threshold: float) -> torch.Tensor:
    """The assignment of greatest total IoU, by scipy; its pairs below the threshold are then not matched."""
    optimize = third_party("scipy.optimize", "matching='hungarian'")
    matched, ious = torch.full(pairs.iou.shape[:2], -1), pairs.iou.clamp(min=0).numpy()
    for out, iou, p, g in zip(matched.numpy(), ious, pairs.predicted.tolist(), pairs.wanted.tolist(), strict=True):
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
    """What (B, P, G) holds for each matched pair, (B, P); 0 for boxes without a match."""
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
    """``sum(IoU^power of the matched pairs) / max(number predicted, number wanted)``.

    With matching="confidence" it is Visual-RFT's ratio (2503.01785), which drops exact duplicates first and asks for an IoU
    above 0.5, not of at least 0.5; with matching="hungarian" and power=2 the overlap is scored as in Perception-R1
    (2504.07954). No boxes where none are wanted: 1.

    Args:
        predictions: of ``answers.parse_boxes``. references: what ``answers.as_boxes`` takes.
        matching: "hungarian" (greatest total IoU), "greedy" (best pair first) or "confidence" (most confident box first).
        threshold: the least IoU of a match.
    """
    require_one_of("matching", matching, MATCHINGS)
    require_positive("power", power)
    require(0 <= threshold <= 1, "threshold", "be in [0, 1]", threshold)

    def score(predictions: list[Boxes], references: list[Boxes]) -> torch.Tensor:
        pairs = _pairs([_in_order(p) for p in predictions], references)
        total = (_of_matched(pairs.iou, MATCHINGS[matching](pairs, threshold)) ** power).sum(1)
        return _empty(pairs, total / torch.maximum(pairs.predicted, pairs.wanted).clamp(min=1))

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
    """VLM-R1's weighted sum over greedy matches, which ignore labels.

    The weighted mean of: the sum of the IoUs of matches whose labels agree, over the number wanted; the number of those, over
    the number wanted; and the mean of precision and recall of the matches. VLM-R1's own IoU counts pixels, and differs a little
    from torchvision's, which is taken here.

    Source: https://arxiv.org/abs/2504.07615, https://github.com/om-ai-lab/VLM-R1
    """
    weights = (position, label, completeness)
    require(min(weights) >= 0 and sum(weights) > 0, "position, label, completeness", "be >= 0, and one of them > 0", weights)

    def score(predictions: list[Boxes], references: list[Boxes]) -> torch.Tensor:
        pairs = _pairs(predictions, references, by_label=False)
        matched = match_greedy(pairs, threshold)
        agree, predicted, wanted = _of_matched(pairs.same, matched), pairs.predicted.clamp(min=1), pairs.wanted.clamp(min=1)
        overlap, hits = _of_matched(pairs.iou, matched) * agree, (matched >= 0).sum(1).double()
        parts = overlap.sum(1) / wanted, agree.double().sum(1) / wanted, (hits / wanted + hits / predicted) / 2
        return _empty(pairs, sum(w * part for w, part in zip(weights, parts, strict=True)) / sum(weights))

    return _scored(predictions, references, score)


@pure(as_boxes)
def mean_ap(
    predictions: list[Boxes],
    references: list[Boxes],
    *,
    thresholds: Sequence[float] = IOU_THRESHOLDS,
    over_prediction_penalty: bool = True,
) -> torch.Tensor:
    """COCO's mean average precision of one image, times ``min(1, wanted / predicted)`` as in VLM-R1.

    Per label of the reference: predictions in order of confidence, matched at each IoU threshold, precision interpolated at 101
    recalls; the mean over thresholds and labels. Without confidences mAP charges nothing for boxes after the last hit; hence
    the penalty. pycocotools gives the same values (its limit of 100 predictions aside).

    Source: https://cocodataset.org/#detection-eval; https://arxiv.org/abs/2504.07615
    """
    require(len(thresholds) > 0 and all(0 < t <= 1 for t in thresholds), "thresholds", "be in (0, 1]", list(thresholds))

    def score(predictions: list[Boxes], references: list[Boxes]) -> torch.Tensor:
        pairs = _pairs([_in_order(p) for p in predictions], references)
        hit = match_confidence(pairs, thresholds) >= 0
        total = torch.zeros(len(predictions), dtype=torch.float64)
        for label in range(int(pairs.wanted_labels.max()) + 1):
            own, wanted = (pairs.labels == label)[:, None], (pairs.wanted_labels == label).sum(1)[:, None, None]
            hits, rank = (hit & own).cumsum(-1), own.cumsum(-1)
            # Interpolated: the greatest precision at this recall or a higher one.
            precision = (hits.double() / rank.clamp(min=1)).flip(-1).cummax(-1).values.flip(-1)
            # Each hit takes the recall past some of the 101 points, at its precision.
            passed = torch.searchsorted(RECALLS, hits.double() / wanted.clamp(min=1), right=True).masked_fill(hits == 0, 0)
            total += (precision * passed.diff(prepend=torch.zeros_like(passed[..., :1]))).sum(-1).mean(1) / len(RECALLS)
        scores = total / (pairs.wanted_labels.max(1).values + 1).clamp(min=1)
        if over_prediction_penalty:
            scores *= (pairs.wanted.double() / pairs.predicted.clamp(min=1)).clamp(max=1)
        return _empty(pairs, scores)

    return _scored(predictions, references, score)
