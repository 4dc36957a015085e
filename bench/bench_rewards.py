"""Rewards of 10,000 completions, from text and from parsed answers, compared with Python that scores one pair at a time."""

import json
import random

import harness
import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_iou

from vlmkernels.rewards import detection, text
from vlmkernels.rewards.answers import parse_boxes
from vlmkernels.rewards.builtin import build

NUM, MOST = 10_000, 20
pytestmark = pytest.mark.skipif(harness.GPU, reason="rewards run on the CPU; CUDA events do not time them")


def some_boxes(rng: random.Random) -> list[dict]:
    corners = [(rng.randint(0, 900), rng.randint(0, 900)) for _ in range(rng.randint(1, MOST))]
    return [
        {"bbox_2d": [x, y, x + rng.randint(20, 300), y + rng.randint(20, 300)], "label": rng.choice(("cat", "dog", "bus"))}
        for x, y in corners
    ]


def guess(rng: random.Random, wanted: list[dict]) -> list[dict]:
    """Boxes near the reference boxes in another order, and some other boxes."""
    near = [
        {**box, "bbox_2d": [v + rng.randint(-9, 9) for v in box["bbox_2d"]], "score": round(rng.random(), 2)} for box in wanted
    ]
    other = [{**box, "score": round(rng.random(), 2)} for box in some_boxes(rng)]
    return rng.sample(near + other, min(MOST, len(near) + len(other) // 2))


def python_iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(0, width) * max(0, height)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def python_ious(predicted: list[dict], wanted: list[dict]) -> list[list[float]]:
    return [
        [python_iou(p["bbox_2d"], w["bbox_2d"]) if p["label"] == w["label"] else 0.0 for w in wanted] for p in predicted
    ]  # fmt: skip


def python_hungarian(predicted: list[dict], wanted: list[dict]) -> float:
    ious = python_ious(predicted, wanted)
    pairs = zip(*linear_sum_assignment(ious, maximize=True), strict=True)
    return sum(ious[p][w] for p, w in pairs if ious[p][w] >= 0.5) / max(len(predicted), len(wanted))


def python_confidence(predicted: list[dict], wanted: list[dict]) -> float:
    predicted = sorted(predicted, key=lambda box: -box["score"])
    ious, free, total = python_ious(predicted, wanted), set(range(len(wanted))), 0.0
    for row in ious:
        best = max(free, key=lambda w: row[w], default=None)
        if best is not None and row[best] >= 0.5:
            free.remove(best)
            total += row[best]
    return total / max(len(predicted), len(wanted))


def checked(expected: list[float]):
    def check(name: str, scores: list[float]) -> str:
        error = float(np.abs(np.array(scores, dtype=np.float64) - expected).max())
        assert error < 1e-6, f"{name} is wrong by {error}"
        return f"{error:.0e}, mean score {np.mean(expected):.2f}"

    return check


@pytest.mark.parametrize(("matching", "in_python"), [("hungarian", python_hungarian), ("confidence", python_confidence)])
def test_box_sets(benchmark, matching, in_python):
    rng = random.Random(0)
    wanted = [some_boxes(rng) for _ in range(NUM)]
    written = [json.dumps(guess(rng, boxes)) for boxes in wanted]
    completions = [f"<think>I look.</think><answer>{boxes}</answer>" for boxes in written]
    parsed, read = [parse_boxes(boxes) for boxes in written], [json.loads(boxes) for boxes in written]
    reward = build("matched_iou", matching=matching)
    padded = torch.rand(2, NUM, MOST, 4, dtype=torch.float64)
    providers = {
        "vlmkernels": lambda: detection.matched_iou(parsed, wanted, matching=matching),
        "vlmkernels, from completions": lambda: reward(completions, answer=wanted),
        "Python, pair by pair": lambda: [in_python(p, w) for p, w in zip(read, wanted, strict=True)],
    }
    check = checked(providers["Python, pair by pair"]())
    floors = {"box_iou of the padded boxes": lambda: box_iou(*padded)}
    harness.compare(
        benchmark, harness.Case(f"rewards box sets {NUM} x {MOST}, {matching}", providers, check, floors, limit_s=60)
    )


def python_ap(predicted: list[dict], wanted: list[dict]) -> float:
    """COCO's average precision, one label and one threshold after another."""
    scores = []
    for label in {box["label"] for box in wanted}:
        truth = [box for box in wanted if box["label"] == label]
        found = sorted((box for box in predicted if box["label"] == label), key=lambda box: -box["score"])
        ious = python_ious(found, truth)
        for threshold in np.linspace(0.5, 0.95, 10):
            free, points, hits = set(range(len(truth))), [], 0
            for rank, row in enumerate(ious, 1):
                best = max(free, key=lambda w: row[w], default=None)
                if best is not None and row[best] >= threshold:
                    free.remove(best)
                    hits += 1
                points.append((hits / len(truth), hits / rank))
            recalls = np.linspace(0, 1, 101)
            scores.append(np.mean([max((p for recall, p in points if recall >= r), default=0.0) for r in recalls]))
    return float(np.mean(scores)) * min(1.0, len(wanted) / max(1, len(predicted)))


def test_mean_ap(benchmark):
    """Without pycocotools, which needs milliseconds per image (test_reward_functions.py compares values with it)."""
    rng = random.Random(0)
    wanted = [some_boxes(rng) for _ in range(NUM // 10)]
    written = [json.dumps(guess(rng, boxes)) for boxes in wanted]
    parsed, read = [parse_boxes(boxes) for boxes in written], [json.loads(boxes) for boxes in written]
    reward = build("mean_ap")
    providers = {
        "vlmkernels": lambda: detection.mean_ap(parsed, wanted),
        "vlmkernels, from completions": lambda: reward(written, answer=wanted),
        "Python, pair by pair": lambda: [python_ap(p, w) for p, w in zip(read, wanted, strict=True)],
    }
    check = checked(providers["Python, pair by pair"]())
    harness.compare(benchmark, harness.Case(f"rewards mean_ap {len(wanted)} x {MOST}", providers, check, limit_s=60))


def python_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]


def test_ocr(benchmark):
    """Lines of 20 to 80 characters with some wrong characters."""
    pytest.importorskip("rapidfuzz")
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cpdist

    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz ABC0123456789.,"
    wanted = ["".join(rng.choices(letters, k=rng.randint(20, 80))).strip() for _ in range(NUM)]
    read = ["".join(c if rng.random() < 0.9 else rng.choice(letters) for c in line).strip() for line in wanted]
    completions = [f"<think>I read.</think><answer>{line}</answer>" for line in read]
    reward = build("cer")
    pairs = list(zip(read, wanted, strict=True))
    providers = {
        "vlmkernels cer": lambda: text.cer(read, wanted),
        "vlmkernels cer, from completions": lambda: reward(completions, answer=wanted),
        "rapidfuzz, pair by pair": lambda: [1 - min(1, Levenshtein.distance(p, w) / len(w)) for p, w in pairs],
        "Python, pair by pair": lambda: [1 - min(1, python_distance(p, w) / len(w)) for p, w in pairs],
    }
    check = checked(providers["rapidfuzz, pair by pair"]())
    floors = {"rapidfuzz cpdist": lambda: cpdist(read, wanted, scorer=Levenshtein.distance)}
    harness.compare(benchmark, harness.Case(f"rewards OCR {NUM} lines", providers, check, floors, limit_s=60))
