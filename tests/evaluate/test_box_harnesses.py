"""Each harness of ``--match`` scores 10,000 random answers with boxes as we do.

The scores of lmms-eval come from its own functions, and those of VLMEvalKit (``refcoco.py``) and of VLM-R1 (``test_rec_r1.py``)
from formulas of their sources.
"""

import contextlib
import json
import re
from functools import cache

import datasets  # noqa: F401  before lmms-eval imports it: an extension type of Arrow can be registered only once
import numpy as np
import pytest
from PIL import Image
from support import harnesses
from support.evaluations import given

from vlmkernels.evaluate.evaluation import Evaluation, Scoring

COUNT = 10_000
SIZES = ((640, 480), (1333, 800), (97, 211), (2048, 1536))
IMAGES = {size: Image.new("RGB", size) for size in SIZES}
FORMS = (
    *("{list}", "{list}", "{spaced}", "{tuple}", "{pair}", "{words}", "{named}", "[{list}]", "{json}", "{json}", "{dict}"),
    *("The box is {list}.", "In the 640x480 image it is at {list}.", "{dict}, or {list}", "{list} or {other}", "{indented}"),
    *("{other} {list}", "[{dict}, {otherdict}]", "[{otherdict}, {dict}]", "{dict}\n{otherdict}", "```json\n{json}\n```"),
    *("```json\n{indented}\n```", "<|box_start|>{pair}<|box_end|>", "<ref>cat</ref><box>[{list}]</box>", "{cut}", "{dict:.20}"),
    *("<|begin_of_box|>[{list}]<|end_of_box|>", "{{'bbox_2d': {list}, 'label': 'cat'}}", "{{}} {list}"),
    *("none", "", "There are 2 cats.", "1, 2, 3"),
)
WRAPS = (
    *("{0}", "{0}", "<answer>{0}</answer>", "<answer>\n{0}\n</answer>", "<think>I look.</think><answer>{0}</answer>"),
    *("<think>It is at [1, 2, 30, 40].</think>{0}", "<think>a</think>\n<answer>{0}</answer> {0}", "<answer>{0}"),
    *("<answer>{0}</answer><answer>[1, 2, 3, 4]</answer>", "<think>{0}", "**{0}**"),
)


def box_near(rng, box: list, size: tuple[int, int]) -> list:
    """Coordinates near a box: the box, half of it, a shifted box, or four other numbers that may be in the wrong order."""
    x1, y1, x2, y2 = box
    kind = rng.integers(8)
    if kind == 0:
        return box
    if kind == 1:
        return [x1, y1, (x1 + x2) // 2, y2]
    if kind == 2:
        return rng.integers(-20, max(size) + 300, 4).tolist()
    scale = max(1, round((0.02, 0.1, 0.3)[kind % 3] * (x2 - x1)))
    moved = (np.array(box) + rng.integers(-scale, scale + 1, 4)).tolist()
    return moved if rng.random() < 0.2 else [max(0, v) for v in moved]


def numbers(rng, box: list, size: tuple[int, int]) -> list:
    """Pixels, thousandths, fractions, percent, or numbers with decimals."""
    shares = [v / side for v, side in zip(box, size * 2, strict=True)]
    return (
        box,
        box,
        [round(1000 * v) for v in shares],
        [round(v, int(rng.integers(1, 5))) for v in shares],
        [round(100 * v, 1) for v in shares],
        [v + round(float(d), 2) for v, d in zip(box, rng.random(4), strict=True)],
    )[rng.integers(6)]


def written(rng, box: list, other: list) -> str:
    a, b, c, d = box
    fields = {
        "list": str(box) if rng.random() < 0.7 else f"[{a},{b},{c},{d}]",
        "spaced": f"[ {a} , {b} , {c} , {d} ]",
        "tuple": f"({a}, {b}, {c}, {d})",
        "pair": f"({a},{b}),({c},{d})",
        "words": f"[{a} {b} {c}  {d}]",
        "cut": f"[{a}, {b}, {c}, {d}",
        "named": f"x1={a}, y1={b}, x2={c}, y2={d}",
        "json": json.dumps([{"bbox_2d": box, "label": "cat"}]),
        "indented": json.dumps([{"bbox_2d": box, "label": "cat"}], indent=1),
        "dict": json.dumps({"bbox_2d": box}),
        "other": str(other),
        "otherdict": json.dumps({"label": "cat", "bbox_2d": other}),
    }
    return WRAPS[rng.integers(len(WRAPS))].format(FORMS[rng.integers(len(FORMS))].format(**fields))


@cache
def drawn() -> tuple[list[str], list[dict]]:
    """Answers and the rows of the dataset."""
    rng, answers, rows = np.random.default_rng(0), [], []
    for _ in range(COUNT):
        width, height = size = SIZES[rng.integers(len(SIZES))]
        (x1, x2), (y1, y2) = (sorted(rng.choice(side, 2, replace=False).tolist()) for side in (width, height))
        if rng.random() < 0.1:
            x2, y2 = x1 + int(rng.integers(1, 4)), y1 + int(rng.integers(1, 4))
        near, other = (numbers(rng, box_near(rng, [x1, y1, x2, y2], size), size) for _ in range(2))
        answers.append(written(rng, near, other))
        rows.append({"prompt": "?", "image": IMAGES[size], "answer": [x1, y1, x2, y2]})
    return answers, rows


def check(tmp_path, match: str, expected: np.ndarray, hits: dict[str, np.ndarray], **scoring) -> None:
    """Compare IoUs (N,) and hits (N,) by metric with those of our evaluation."""
    answers, rows = drawn()
    found = Evaluation(given(tmp_path / "p.jsonl", answers), rows, Scoring(task="grounding", match=match, **scoring))
    (group,) = found.groups.values()
    for metric, theirs in {"miou": expected, **hits}.items():
        ours = group.statistic(metric).statistics[:, 0, 0]
        differ = np.flatnonzero(np.abs(ours - theirs) > 1e-12)
        shown = [(answers[i], rows[i]["answer"], ours[i], theirs[i]) for i in differ[:5]]
        assert len(differ) == 0, (metric, len(differ), shown)
        assert 0.02 < theirs.mean() < 0.9
    assert (group.answers["image"].correct[:, 0] == hits["acc@0.5"]).all()


def scores(function, pairs: list[tuple], *options) -> np.ndarray:
    """Scores of lmms-eval; 0 where it ends with a division by zero, as it does where the areas of two boxes sum to 0."""
    found = np.zeros(len(pairs))
    for index, pair in enumerate(pairs):
        with contextlib.suppress(ZeroDivisionError):
            found[index] = function(*pair, *options)
    return found


@pytest.mark.skipif(not harnesses.INSTALLED, reason=f"lmms-eval is not in {harnesses.LMMS_EVAL.parent}")
def test_lmms_eval(tmp_path):
    rec, pairs = harnesses.load("tasks/refcoco/utils_rec.py"), []
    for answer, row in zip(*drawn(), strict=True):
        doc = {"question_id": 0, "answer": "a cat", "bbox": row["answer"]}
        found = harnesses.results_of(rec.refcoco_bbox_rec_process_result, answer, doc)["refcoco_IoU"]
        pairs.append((found["bbox"], found["pred"]))
    hits = {f"acc@{t}": scores(rec.compute_accuracy, pairs, t) for t in (0.1, 0.3, 0.5, 0.7, 0.9)}
    check(tmp_path, "lmms-eval", scores(rec.compute_iou, pairs), hits)


def overlap(a, b) -> tuple[float, float]:
    """Width and height that two boxes share; negative if they are apart."""
    return min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])


def area(box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def vlmevalkit_iou(answer: str, row: dict) -> float:
    """Corners are sorted after numbers to 1.5 were scaled by the image's size, and numbers to 1000 by a thousandth of it."""
    number = r"[+-]?\d*\.?\d+(?:[eE][+-]?\d+)?"
    within = re.search(r"\[\s*" + r"(?:\s*,\s*|\s+)".join([number] * 4) + r"\s*\]", answer)
    found = np.array(re.findall(number, within[0] if within else answer)[:4], dtype=float)
    if len(found) < 4:
        return 0.0
    sides = np.array(row["image"].size * 2, dtype=float)
    if abs(found).max() <= 1.5:
        found = found * sides
    elif abs(found).max() <= 1000:
        found = found / 1000 * sides
    found = np.sort(found.clip(0, sides).reshape(2, 2), axis=0).flatten()
    width, height = overlap(found, row["answer"])
    shared = width * height if min(width, height) > 0 else 0
    return shared / (area(found) + area(row["answer"]) - shared)


def test_vlmevalkit(tmp_path):
    ious = np.array([vlmevalkit_iou(answer, row) for answer, row in zip(*drawn(), strict=True)])
    check(tmp_path, "vlmevalkit", ious, {"acc@0.5": ious >= 0.5})
    assert (ious == 0.5).sum() > 20


def vlm_r1_iou(answer: str, row: dict, scale: tuple[float, ...] = (1, 1, 1, 1)) -> float:
    """Whole numbers within braces within the first answer element; boxes that share a pixel's width or less do not overlap."""
    element = re.search("<answer>(.*?)</answer>", answer, re.S)
    within = element and re.search(r"\{.*\[" + r",\s*".join([r"(\d+)"] * 4) + r"\].*\}", element[1].strip(), re.S)
    if not within:
        return 0.0
    box = [int(v) / s for v, s in zip(within.groups(), scale, strict=True)]
    width, height = overlap(box, row["answer"])
    shared = width * height if min(width, height) > 1 else 0
    return shared / (area(box) + area(row["answer"]) - shared) if shared else 0.0


def test_vlm_r1(tmp_path):
    ious = np.array([vlm_r1_iou(answer, row) for answer, row in zip(*drawn(), strict=True)])
    check(tmp_path, "vlm-r1", ious, {"acc@0.5": ious > 0.5})
    assert (ious == 0.5).sum() > 20


def test_boxes_outside_their_frame_for_vlm_r1(tmp_path):
    """VLM-R1 scales a box from the resized image, wherever it lies; without ``--match`` such a box counts as unparsed."""
    row = {"prompt": "?", "image": IMAGES[640, 480], "answer": [0, 0, 640, 480]}
    given_boxes = given(tmp_path / "p.jsonl", ['<answer>{"bbox_2d": [0, 0, 400, 240]}</answer>'], resized=[[320, 240]])
    for match, iou, failures in (("vlm-r1", 0.8, 0), ("vlmkernels", 0, 1)):
        found = Evaluation(given_boxes, [row], Scoring(task="grounding", match=match, frame="resized", replicates=2))
        assert found.value("grounding", "miou") == pytest.approx(iou)
        assert found.value("grounding", "parse_failure_rate") == failures


def test_the_frame_of_vlmevalkit(tmp_path):
    """It is found from the values, so that it cannot be given. Without an image, boxes are in the frame of the reference."""
    row, predictions = {"prompt": "?", "answer": [5, 5, 9, 9]}, given(tmp_path / "p.jsonl", ["9 9 5 5"])
    found = Evaluation(predictions, [row], Scoring(task="grounding", match="vlmevalkit", replicates=2))
    assert found.value("grounding", "miou") == 1
    message = "frame must be 'original' with match 'vlmevalkit', which guesses the frame, got '0-1'"
    with pytest.raises(ValueError, match=message):
        Evaluation(predictions, [row], Scoring(task="grounding", match="vlmevalkit", frame="0-1"))
