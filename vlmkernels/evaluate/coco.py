"""Average precision of detections, computed with pycocotools."""

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vlmkernels.rewards.answers import Boxes


def _quietly(function: Callable, *arguments: Any) -> Any:
    """Call a function of pycocotools without its output."""
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments)


def _is_unlabelled(reference: Boxes, names: set[str | None]) -> bool:
    labels = set(reference.labels) or names
    return labels <= {None}


def _without_labels(boxes: Boxes) -> Boxes:
    return boxes._replace(labels=[None] * len(boxes.labels))


class CocoAP:
    """COCO's AP over all areas with 100 detections per image; a ``Statistic``.

    Every completion counts as one image. Boxes without a label form one category; where the reference has no labels, those of
    predictions are ignored. Boxes without a confidence have score 1.
    Labels that occur in no reference are left out, as they are no categories. Without any reference box the AP is NaN.

    Args:
        predictions: the boxes of G completions for each of N samples; None for a completion without boxes.
        references: the reference boxes of each sample.
        threshold: IoU threshold. Default: average over the thresholds 0.5, 0.55, ..., 0.95.
    """

    max_replicates = 200  # fewer than for other metrics, because each replicate sorts all detections again

    def __init__(
        self, predictions: Sequence[Sequence[Boxes | None]], references: Sequence[Boxes], threshold: float | None = None
    ):
        try:
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval
        except ImportError as error:
            raise ImportError("ap and ap50 need the package pycocotools: pip install 'vlmkernels[eval]'") from error

        self.shape = len(predictions), len(predictions[0])
        names = {label for reference in references for label in reference.labels}
        predictions = [
            [_without_labels(p) if p and _is_unlabelled(reference, names) else p for p in group]
            for group, reference in zip(predictions, references, strict=True)
        ]
        categories = {label: index for index, label in enumerate(sorted(names, key=str), 1)}
        truth, found = [], []
        for sample, (group, reference) in enumerate(zip(predictions, references, strict=True)):
            for seed, prediction in enumerate(group):
                image = sample * self.shape[1] + seed
                truth += [
                    self._annotation(image, categories[label], box, id=len(truth) + place, iscrowd=0)
                    for place, (box, label) in enumerate(zip(reference.boxes, reference.labels, strict=True), 1)
                ]
                found += [
                    self._annotation(image, categories[label], box, score=1.0 if score is None else score)
                    for box, label, score in (zip(*prediction, strict=True) if prediction else ())
                    if label in categories
                ]
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": image} for image in range(self.shape[0] * self.shape[1])],
            "annotations": truth,
            "categories": [{"id": index} for index in categories.values()],
        }
        _quietly(coco.createIndex)
        self.evaluation = COCOeval(coco, _quietly(coco.loadRes, found) if found else COCO(), "bbox")
        if not found:
            self.evaluation.cocoDt.dataset = {**coco.dataset, "annotations": []}
            _quietly(self.evaluation.cocoDt.createIndex)
        self.evaluation.params.areaRng, self.evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        if threshold is not None:
            self.evaluation.params.iouThrs = np.array([threshold])
        _quietly(self.evaluation.evaluate)
        self.images = np.array(self.evaluation.evalImgs, dtype=object).reshape(len(categories), np.prod(self.shape))

    @staticmethod
    def _annotation(image: int, category: int, box: tuple[float, ...], **more: Any) -> dict[str, Any]:
        x1, y1, x2, y2 = box
        width, height = max(0.0, x2 - x1), max(0.0, y2 - y1)  # COCOeval would ignore a prediction of negative area
        size = {"bbox": [x1, y1, width, height], "area": width * height}
        return {"image_id": image, "category_id": category, **size, **more}

    def value(self, samples: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """See ``Statistic``."""
        return np.array([self._ap(np.outer(*weights).flatten().astype(int)) for weights in zip(samples, seeds, strict=True)])

    def _ap(self, copies: np.ndarray) -> float:
        """Return the AP of a dataset with ``copies[i]`` copies of image i, accumulated by COCOeval."""
        evaluation = self.evaluation
        chosen = np.repeat(np.arange(len(copies)), copies)
        evaluation.evalImgs = self.images[:, chosen].flatten().tolist()
        evaluation.params.imgIds = evaluation._paramsEval.imgIds = list(range(len(chosen)))
        _quietly(evaluation.accumulate)
        precision = evaluation.eval["precision"][..., 0, -1]  # (thresholds, recalls, categories); -1 without references
        return float(precision[precision > -1].mean()) if (precision > -1).any() else np.nan
