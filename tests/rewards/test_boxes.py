"""Boxes and points: what is read from answers and references, scores by hand, and comparisons with pycocotools and VLM-R1."""

import json
import math
import time

import numpy as np
import pytest
import torch
from datasets import Dataset

from vlmkernels.rewards import Unparsed, answers, boxes, detection
from vlmkernels.rewards.answers import Boxes, as_boxes
from vlmkernels.rewards.builtin import build

torch.set_num_threads(1)

CAT, DOG = [10, 20, 30, 40], [1, 2, 3, 4]
GOLD = [{"bbox_2d": CAT, "label": "cat"}]
BOTH = [*GOLD, {"bbox_2d": DOG, "label": "dog"}]
ONE, TWO = ([CAT], ["cat"]), ([CAT, DOG], ["cat", "dog"])
ROW = json.dumps(GOLD[0])


NONE = [
    "[]", "None", "none.", "```json\n[]\n```", "No objects", "There are none.", "No objects: []", '{"bbox": []}',
    "There are no objects in the image.", "No boxes were found.", "<|begin_of_box|>[]<|end_of_box|>",
]  # fmt: skip


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        # JSON and Python literals
        ("[10, 20, 30, 40]", ([CAT], [None])),
        (json.dumps(BOTH), TWO),
        (f"Here are the boxes: {json.dumps(GOLD)}", ONE),
        (f"{json.dumps(BOTH)}\nI found a cat, and one dog.", TWO),
        (f"Sure!\n```json\n{json.dumps(BOTH, indent=2)}\n```\nThere is one cat.", TWO),
        (f"```json\n{json.dumps(GOLD)}", ONE),
        ("\n".join(map(json.dumps, BOTH)), TWO),
        (f"{ROW},\n{json.dumps(BOTH[1])}.", TWO),
        (str(BOTH), TWO),
        ("[{'Position': [10, 20, 30, 40], 'label': ' Cat ', 'Confidence': 0.5,},]", ONE),
        ('[{"bbox_2d": [10, 20, 30, 40], "label": null},]', ([CAT], [None])),
        ('{"bbox": [[10, 20, 30, 40], [1, 2, 3, 4]], "category": ["cat", "dog"]}', TWO),
        ('{"boxes": [[10, 20, 30, 40], [1, 2, 3, 4]], "label": "cat"}', ([CAT, DOG], ["cat", "cat"])),
        ('{"x1": 10, "y1": 20, "x2": 30, "y2": 40, "class": "cat"}', ONE),
        ('{"bbox_2d": ["10", "20", "30", "40"], "label": "cat"}', ONE),
        # markup of Qwen2-VL, Qwen-VL, InternVL, GLM-4.1V, DeepSeek-VL2 and PaliGemma
        ("<|object_ref_start|>cat<|object_ref_end|><|box_start|>(10,20),(30,40)<|box_end|>", ONE),
        ("<ref>Cat</ref><box>(10,20),(30,40)</box> and a <ref>dog</ref><box>(1,2),(3,4)</box>.", TWO),
        ("<ref>cat</ref><box>[[10, 20, 30, 40], [1, 2, 3, 4]]</box>", ([CAT, DOG], ["cat", "cat"])),
        ("<ref>cat</ref><box>(10,20),(30,40)</box><box>(1,2),(3,4)</box>", ([CAT, DOG], ["cat", "cat"])),
        ("<box>(10,20),(30,40)</box><box>(1,2),(3,4)</box>", ([CAT, DOG], [None, None])),
        ("<|begin_of_box|>[[10,20,30,40]]<|end_of_box|>", ([CAT], [None])),
        (f"<|begin_of_box|>{json.dumps(GOLD)}<|end_of_box|>", ONE),
        ("<|ref|>cat<|/ref|><|det|>[[10, 20, 30, 40]]<|/det|>", ONE),
        ("<loc0020><loc0010><loc0040><loc0030> cat ; <loc0002><loc0001><loc0004><loc0003> dog", TWO),
        # the same without special tokens
        ("(10,20),(30,40)", ([CAT], [None])),
        ("cat(10,20),(30,40)dog(1,2),(3,4)", TWO),
        # running text
        ("cat: [10, 20, 30, 40]\ndog: [1, 2, 3, 4]", TWO),
        ("- **cat**: [10, 20, 30, 40]\n- **dog**: (1, 2, 3, 4).", TWO),
        ("Here is the result:\n1. cat: [10, 20, 30, 40]\n2. dog: [1, 2, 3, 4]", TWO),
        ("cat: (10,20),(30,40); dog: (1,2),(3,4)", TWO),
        ("traffic light: [10, 20, 30, 40]", ([CAT], ["traffic light"])),
        ("猫：[10, 20, 30, 40]", ([CAT], ["猫"])),
        ("cat: [[10, 20, 30, 40], [1, 2, 3, 4]]", ([CAT, DOG], ["cat", "cat"])),
        ("one at [10, 20, 30, 40], one at [1, 2, 3, 4]", ([CAT, DOG], [None, None])),
        ("Here are the two boxes: [10, 20, 30, 40], [1, 2, 3, 4]", ([CAT, DOG], [None, None])),
        ("There are 2 objects in the image: [[10, 20, 30, 40], [1, 2, 3, 4]]", ([CAT, DOG], [None, None])),
        ("The bounding box is [.5, 2., +3e0, 4]", ([[0.5, 2, 3, 4]], [None])),
        ("[[10, 20, 30, 40], [2, 2, 1, 1]]", ([CAT, [2, 2, 1, 1]], [None, None])),  # without area
        # no boxes
        *((none, ([], [])) for none in NONE),
    ],
)  # fmt: skip
def test_boxes_of_an_answer(written, expected):
    found = answers.parse_boxes(written)
    assert (found.boxes.tolist(), found.labels) == expected


UNREADABLE = [
    # cut off
    json.dumps(GOLD)[:-1], json.dumps(BOTH)[:-9], "[[10, 20, 30, 40], [1, 2", "[10, 20, 30, 40], [1, 2, 3",
    "(10,20),(30,40),(1,2",
    "<ref>cat</ref><box>(10,20),(30,40)</box><ref>dog</ref><box>(1,", "<ref>cat</ref>", "<ref>cat",
    "<loc0020><loc0010><loc0040>", f"{ROW}\n{ROW[:-3]}",
    # a label that cannot be read or assigned
    '[{"bbox_2d": [10, 20, 30, 40], "label": "the "red" cat"}]', "The cat is at [10, 20, 30, 40].", "[10, 20, 30, 40] cat",
    "cat [10, 20, 30, 40] dog [1, 2, 3, 4]", "cats: [10, 20, 30, 40], [1, 2, 3, 4]", "cat and dog: [10, 20, 30, 40]",
    '{"bbox_2d": [10, 20, 30, 40], "description": "cat"}', '{"bbox_2d": [10, 20, 30, 40], "label": ["cat"]}',
    '{"cat": [10, 20, 30, 40]}', "The image shows a cat(10,20),(30,40)", '{"bbox": [[1, 2, 3, 4]], "label": ["cat", "dog"]}',
    "cat: [10, 20, 30, 40] 0.9",
    # ambiguous
    "There are 3 objects: [10, 20, 30, 40], [1, 2, 3, 4]",
    "[10, 20, 30, 40] or [1, 2, 3, 4]", f"{json.dumps(GOLD)} {json.dumps(BOTH)}",
    '{"bbox_2d": [1, 2, 3, 4], "bbox_2d": [5, 6, 7, 8]}',
    "{'bbox_2d': [1, 2, 3, 4], 'bbox_2d': [5, 6, 7, 8]}", '{"bbox_2d": [1, 2, 3, 4], "bbox": [5, 6, 7, 8]}',
    "```\n[]\n```\n```\n[]\n```", "(10,20),(30,40),(1,2)", "Not [] but [10, 20, 30, 40]", f"[{ROW}, [1, 2, 3, 4]]",
    # not boxes
    "nothing", "", "{}", "null", "[[0, 0, 1, 1], [2, 2]]", "[[0, 0, 1, 1, 2, 2, 3, 3]]", "[" * 5000, "[10, 20, 30, NaN]",
    '[{"bbox_2d": [0, 0, 1, 1], "score": "x"}]', '[{"bbox_2d": [0, 0, 1, 1], "score": NaN}]', "[0.9, 10, 20, 30, 40]",
    '{"box_2d": [10, 20, 30, 40], "label": "cat"}',  # Gemini: y1, x1, y2, x2
]  # fmt: skip


@pytest.mark.parametrize("written", UNREADABLE)
def test_never_a_part_of_the_boxes(written):
    assert answers.parse_boxes(written) is None
    for name in ("mean_ap", "matched_iou", "weighted_match"):
        (score,) = build(name)([written], ["q"], answer=[GOLD])
        assert isinstance(score, Unparsed)


@pytest.mark.parametrize(
    "piece", ["[", "(", "[1,", "(1", "<ref>", "<point x=", "cat: ", "9", "1.", "<loc0001>", '["', "[1, 2, 3, 4]"]
)
def test_long_answers_take_linear_time(piece):
    start = time.process_time()
    for parse in (answers.parse_boxes, answers.parse_box, answers.parse_point):
        parse(piece * 10_000)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("parse", "written", "expected"),
    [
        (answers.parse_box, "[1, 2, 3, 4]", (1, 2, 3, 4)),
        (answers.parse_box, "It is at (1, 2.5, 3, 4).", (1, 2.5, 3, 4)),
        (answers.parse_box, '```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "cat"}]\n```', (1, 2, 3, 4)),
        (answers.parse_box, "[[1, 2, 3, 4], [1, 2, 3, 4]]", (1, 2, 3, 4)),
        (answers.parse_box, "[[1, 2, 3, 4], [1, 2, 3, 5]]", None),
        (answers.parse_box, "[3, 2, 1, 4]", None),
        (answers.parse_box, "[1, 2, 3, NaN]", None),
        (answers.parse_box, "[1, 2, 3]", None),
        (answers.parse_box, "[]", None),
        (answers.parse_point, "[1, 2]", (1, 2)),
        (answers.parse_point, '[{"point_2d": [1, 2]}]', (1, 2)),
        (answers.parse_point, "click(1, 2)", (1, 2)),
        (answers.parse_point, "[0, 0, 2, 4]", (1, 2)),
        (answers.parse_point, "(1, 2) or (3, 4)", None),
        (answers.parse_point, "[1, Infinity]", None),
        (answers.parse_box, f"Here it is: {json.dumps(GOLD)}", tuple(CAT)),
        (answers.parse_box, "<|box_start|>(10,20),(30,40)<|box_end|>", tuple(CAT)),
        (answers.parse_box, "The red cat is at (10,20),(30,40).", tuple(CAT)),
        (answers.parse_box, "[1, 2, 3, 4], [1, 2, 3", None),
        (answers.parse_box, json.dumps(GOLD)[:-1], None),
        (answers.parse_box, "none", None),
        (answers.parse_point, '{"x": 1, "y": 2}', (1, 2)),
        (answers.parse_point, "[[1, 2]]", (1, 2)),
        (answers.parse_point, '<point x="10.5" y="20" alt="a cat">cat</point>', (10.5, 20)),
        (answers.parse_point, "<points x1='1' y1='2' alt='x1=3'>cats</points>", (1, 2)),
        (answers.parse_point, '<points x1="1" y1="2" x2="3" y2="4" alt="cats">cats</points>', None),
        (answers.parse_point, '<point x="1" alt="cat">cat</point>', None),
        (answers.parse_point, '<points x1="1" y1="2" x2="3', None),
        (answers.parse_point, "<|box_start|>(10,20)<|box_end|>", (10, 20)),
        (answers.parse_point, "<|box_start|>(10,20),(30,40)<|box_end|>", (20, 30)),
        (answers.parse_point, "(10,20),(30,40)", None),
        (answers.parse_point, '{"action": "click", "coordinate": [1, 2]}', (1, 2)),
        (answers.parse_point, '[{"point_2d": [1, 2], "label": "x"}', None),
        (answers.parse_point, "(1, 2), (3", None),
        (answers.parse_point, "[1, 2] and [1, 2, 3]", None),
        (answers.parse_point, '[{"point_2d": [1, 2]}, {"point_2d": [3, 4]}]', None),
    ],
)
def test_one_box_or_point_of_an_answer(parse, written, expected):
    assert parse(written) == expected


BARE = [
    CAT, tuple(CAT), [CAT], np.array(CAT), np.array([CAT], np.float32), torch.tensor([CAT]), [np.array(CAT)],
    [torch.tensor(CAT)], list(np.array(CAT)), {"bbox": np.array(CAT)}, str(CAT), "(10,20),(30,40)",
    # no label
    [{"bbox_2d": CAT, "label": None}], {"bbox": [CAT], "label": [None]}, {"bbox": [CAT], "label": None},
    [{"bbox_2d": CAT, "label": math.nan}], [{"bbox_2d": CAT, "label": " "}],
]  # fmt: skip
LABELED = [
    GOLD, GOLD[0], ROW, f"```json\n{ROW}\n```", "<ref>cat</ref><box>(10,20),(30,40)</box>",
    {"bbox": [CAT], "category": ["Cat"]}, {"boxes": torch.tensor([CAT]), "labels": ["cat"]},
    [{"xmin": 10, "ymin": 20, "xmax": 30, "ymax": 40, "name": "cat", "id": "7"}],
    [{"bbox": CAT, "label": "cat", "box": None}], [{"bbox": CAT, "label": "cat", "category": "animal"}],
]  # fmt: skip
EMPTY = [[], np.empty((0, 4)), torch.empty(0, 4), "[]", "None", {"bbox": [], "category": []}]
MIXED = [
    {"bbox_2d": CAT, "bbox": None, "label": "cat", "category": None},
    {"bbox_2d": None, "bbox": DOG, "label": None, "category": "dog"},
]


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        *((value, ([CAT], [None])) for value in BARE),
        *((value, ONE) for value in LABELED),
        *((value, ([], [])) for value in EMPTY),
        (MIXED, TWO),
        ([{"bbox": CAT, "label": "cat"}, {"bbox": DOG}], ([CAT, DOG], ["cat", None])),
        ({"boxes": np.array([CAT, DOG]), "labels": np.array([1, 2])}, ([CAT, DOG], ["1", "2"])),
    ],
)
def test_references(reference, expected):
    found = as_boxes(reference)
    assert (found.boxes.tolist(), found.labels) == expected
    assert as_boxes(found) is found


def test_references_of_arrow():
    """Missing keys come back as None, in lists of dicts and in dicts of lists."""
    rows = [BOTH, [{"bbox": CAT}], [], [{"bbox_2d": CAT, "score": 0.5}]]
    stored = [row["answer"] for row in Dataset.from_list([{"answer": row} for row in rows])]
    assert [as_boxes(row).labels for row in stored] == [["cat", "dog"], [None], [], [None]]
    assert as_boxes(stored[3]).scores == [0.5]
    columns = [{"bbox": [CAT], "label": ["cat"]}, {"bbox": []}, {"bbox": [CAT]}]
    stored = [row["answer"] for row in Dataset.from_list([{"answer": row} for row in columns])]
    assert [as_boxes(row).labels for row in stored] == [["cat"], [], [None]]
    for name in ("mean_ap", "matched_iou", "weighted_match"):
        assert build(name)(["[[10, 20, 30, 40]]", f"[{ROW}]"], answer=[stored[2]] * 2) == pytest.approx([1, 1])


@pytest.mark.parametrize(
    ("score", "prediction", "reference", "message"),
    [
        (boxes.iou, (0, 0, 1, 1), [[0, 0, 1, 1], [0, 0, 1, 1]], r"must be one box \(x1, y1, x2, y2\), got 2"),
        (boxes.iou, (0, 0, 1, 1), [5, 0, 1, 1], r"must have finite boxes with x1 < x2 and y1 < y2, got \[5.0, 0.0, 1.0, 1.0\]"),
        (boxes.iou, (0, 0, 1, 1), [0, 0, 1, math.nan], "must have finite boxes with x1 < x2 and y1 < y2, got"),
        (boxes.iou, (0, 0, 1, 1), [0, 0, 1], r"must be boxes of 4 numbers, got \[0, 0, 1\]"),
        (boxes.iou, (0, 0, 1, 1), "cat", r"must be boxes \(x1, y1, x2, y2\), got 'cat'"),
        (detection.matched_iou, as_boxes([]), [{"label": "cat"}], "must have bbox_2d or bbox or box or Position, .*, got"),
        (boxes.iou, (0, 0, 1, 1), [[1, 2, 3, 4], {"bbox": DOG}], "must be boxes or dicts with boxes, but not both, got"),
        (boxes.iou, (0, 0, 1, 1), {"bbox": DOG, "label": ["a"]}, "must have labels that are texts, got"),
        (boxes.iou, (0, 0, 1, 1), {"bbox": DOG, "box": CAT}, "must have one of bbox, box, got"),
        (boxes.iou, (0, 0, 1, 1), {"bbox": [DOG], "label": ["a", "b"]}, "must have one label and one score per box, got"),
        (boxes.iou, (0, 0, 1, 1), json.dumps(GOLD)[:-1], r"must be boxes \(x1, y1, x2, y2\), got"),
        (boxes.iou, (0, 0, 1, 1), [{"bbox": CAT, "score": math.inf}], "must have finite scores, got"),
    ],
)
def test_wrong_references_are_named(score, prediction, reference, message):
    with pytest.raises(ValueError, match=rf"references\[1\] {message}"):
        score([None, prediction], [reference, reference])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: detection.matched_iou([as_boxes([])], [[]], matching="best"),
            "matching must be one of confidence, greedy, hungarian",
        ),
        (lambda: detection.matched_iou([as_boxes([])], [[]], threshold=2), r"threshold must be in \[0, 1\], got 2"),
        (lambda: detection.mean_ap([as_boxes([])], [[]], thresholds=[]), r"thresholds must be in \(0, 1\], got \[\]"),
        (lambda: detection.weighted_match([as_boxes([])], [[]], position=-1), "position, label, completeness must be >= 0"),
    ],
)
def test_wrong_options(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_one_box():
    assert boxes.iou([(0, 0, 2, 2), (0, 0, 1, 1), None], [[0, 0, 2, 1], [2, 2, 3, 3], [0, 0, 1, 1]]) == [0.5, 0, None]
    assert boxes.iou([(0, 0, 2, 2)], ["[0, 0, 2, 1]"], power=2) == [0.25]
    assert boxes.giou([(0, 0, 1, 1), (0, 0, 1, 1)], [[2, 0, 3, 1], [0, 0, 1, 1]]) == pytest.approx([-1 / 3, 1])
    assert boxes.point_in_box([(1, 1), (1.1, 1)], [[0, 0, 1, 1]] * 2) == [1, 0]


def test_frames():
    box, sizes = [[100.0, 50.0, 200.0, 100.0]], {"original": [[400, 200]], "resized": [[800, 100]]}
    expected = {
        "original": [100, 50, 200, 100],
        "resized": [200, 25, 400, 50],
        "0-1": [0.25] * 2 + [0.5] * 2,
        "0-100": [25] * 2 + [50] * 2,
        "0-1000": [250] * 2 + [500] * 2,
        "0-1024": [256] * 2 + [512] * 2,
    }
    for source in boxes.FRAMES:
        for target in boxes.FRAMES:
            converted = boxes.convert_frame([expected[source]], source, target, **sizes)
            assert converted[0] == pytest.approx(expected[target])
    assert boxes.convert_frame(box, "original", "original") == pytest.approx(np.array(box))
    assert boxes.convert_frame([[1, 1]], "0-1", "0-1000").tolist() == [[1000, 1000]]
    with pytest.raises(
        ValueError, match="resized sizes must be given to convert from the resized frame to the original frame, got None"
    ):
        boxes.convert_frame(box, "resized", "original", original=[[1, 1]])
    with pytest.raises(ValueError, match="frame must be one of original, resized, 0-1, 0-100, 0-1000, 0-1024, got 'pixels'"):
        boxes.convert_frame(box, "pixels", "pixels")
    inside = boxes.inside_frame(
        np.array([[0, 0, 1000, 1005], [0, 0, 1000, 1020], [-20, 0, 5, 5]]), boxes.frame_sizes("0-1000", None, None)
    )
    assert inside.tolist() == [True, False, False]
    assert boxes.inside_frame(np.array(box), boxes.frame_sizes("original", None, None)).all()


def some_boxes(rng, count: int, labels: str) -> Boxes:
    corner = rng.integers(0, 60, (count, 2))
    corners = np.concatenate([corner, corner + rng.integers(10, 50, (count, 2))], 1)
    return Boxes(corners.astype(float), [str(rng.choice(list(labels))) for _ in corners], [None] * count)


def guesses(rng, wanted: Boxes, scored: bool = True) -> Boxes:
    """Random predictions: boxes near the reference and elsewhere, some with another label, some twice, in random order."""
    other = some_boxes(rng, rng.integers(0, 4), "abc")
    near = wanted.boxes + rng.integers(-3, 4, wanted.boxes.shape)
    boxes, labels = np.concatenate([near, other.boxes]), [*wanted.labels, *other.labels]
    order = rng.permutation(len(boxes))[: rng.integers(len(boxes) // 2, len(boxes) + 1)].tolist() if len(boxes) else []
    order += order[: len(order) // 3]
    labels = [labels[i] if rng.random() < 0.8 else "a" for i in order]
    return Boxes(boxes[order], labels, [float(rng.random()) if scored else None for _ in order])


def coco_ap(predicted: Boxes, wanted: Boxes) -> float:
    """Return the mean average precision of one image according to pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    ids = {name: index for index, name in enumerate(dict.fromkeys(wanted.labels), 1)}

    def rows(side: Boxes) -> list[dict]:
        common = {"image_id": 1, "area": 1, "iscrowd": 0}
        return [
            {**common, "category_id": ids[n], "bbox": [*b[:2], *(b[2:] - b[:2])], "id": i, "score": 1.0 if s is None else s}
            for i, (b, n, s) in enumerate(zip(*side, strict=True), 1)
            if n in ids
        ]

    truth, found = COCO(), rows(predicted)
    truth.dataset = {"images": [{"id": 1}], "categories": [{"id": i} for i in ids.values()], "annotations": rows(wanted)}
    truth.createIndex()
    if not found:
        return 0.0
    run = COCOeval(truth, truth.loadRes(found), "bbox")
    run.params.areaRng, run.params.areaRngLbl = [[0, 1e10]], ["all"]
    run.evaluate()
    run.accumulate()
    return float(run.eval["precision"][:, :, :, 0, -1].mean())


@pytest.mark.parametrize("scored", [True, False])
def test_mean_ap_equals_pycocotools(scored):
    rng = np.random.default_rng(0)
    references = [
        some_boxes(rng, n, "ab") for n in range(1, 61)
    ]  # recalls such as n / 60, which are equal or very close to some of the 101 recalls
    predictions = [guesses(rng, wanted, scored) for wanted in references]
    expected = [coco_ap(p, r) for p, r in zip(predictions, references, strict=True)]
    assert max(expected) > 0.5
    assert detection.mean_ap(predictions, references, over_prediction_penalty=False) == pytest.approx(expected, abs=1e-9)
    penalty = [min(1, len(r.boxes) / max(1, len(p.boxes))) for p, r in zip(predictions, references, strict=True)]
    assert min(penalty) < 1
    penalized = [a * b for a, b in zip(expected, penalty, strict=True)]
    assert detection.mean_ap(predictions, references) == pytest.approx(penalized, abs=1e-9)


CHAIN = [[0, 0, 10, 10], [0, 0, 10, 8]], [[0, 0, 10, 9], [0, 0, 10, 12]]  # IoUs 9/10, 10/12; 8/9, 8/12


def test_matchings():
    predictions, references = as_boxes(CHAIN[0]), CHAIN[1]
    both = [(9 / 10 + 8 / 12) / 2, (8 / 9 + 10 / 12) / 2]
    for matching, expected in {"greedy": both[0], "confidence": both[0], "hungarian": both[1]}.items():
        assert detection.matched_iou([predictions], [references], matching=matching) == pytest.approx([expected])
    later = predictions._replace(scores=[0.1, 0.9])  # the second box chooses first
    assert detection.matched_iou([later], [references], matching="confidence") == pytest.approx([both[1]])
    assert detection.matched_iou([predictions], [references], matching="greedy", threshold=0.7) == pytest.approx([0.45])
    assert detection.matched_iou([predictions], [references], power=2) == pytest.approx([((8 / 9) ** 2 + (10 / 12) ** 2) / 2])


SCORES = {
    "matched_iou": detection.matched_iou,
    "greedy": lambda p, r: detection.matched_iou(p, r, matching="greedy"),
    "confidence": lambda p, r: detection.matched_iou(p, r, matching="confidence"),
    "weighted_match": lambda p, r: detection.weighted_match(p, r),
    "mean_ap": lambda p, r: detection.mean_ap(p, r),
}


@pytest.mark.parametrize("name", SCORES)
def test_sets_of_boxes(name, monkeypatch):
    """Empty sets and labels; a batch gives the scores of its samples alone, whatever its chunks."""
    score = SCORES[name]
    cat, dog = {"bbox_2d": [0, 0, 9, 9], "label": "cat"}, {"bbox_2d": [20, 0, 29, 9], "label": "dog"}
    bare = [{"bbox_2d": cat["bbox_2d"]}]
    empty = as_boxes([])
    assert score([empty, empty, as_boxes([cat]), None, as_boxes([cat])], [[], [cat], [], [cat], None]) == [1, 0, 0, None, None]
    assert score(
        [as_boxes([cat, dog]), as_boxes([dog, cat]), as_boxes([cat])], [[cat, dog], [cat, dog], bare]
    ) == pytest.approx([1] * 3)
    swapped = as_boxes([{**cat, "label": "dog"}, {**dog, "label": "cat"}])
    unlabeled = as_boxes([cat["bbox_2d"], dog["bbox_2d"]])
    wrong = 0.3 if name == "weighted_match" else 0
    assert score([swapped, unlabeled], [[cat, dog]] * 2) == pytest.approx([wrong] * 2)

    rng = np.random.default_rng(1)
    references = [some_boxes(rng, rng.integers(0, 9), "ab") for _ in range(40)]
    predictions = [guesses(rng, wanted) for wanted in references]
    alone = [score([p], [r])[0] for p, r in zip(predictions, references, strict=True)]
    assert len(set(alone)) > 20
    assert score(predictions, references) == pytest.approx(alone, abs=1e-12)
    monkeypatch.setattr(detection, "CHUNK", 100)
    assert score(predictions, references) == pytest.approx(alone, abs=1e-12)


def test_weighted_match_by_hand():
    """Two of three boxes are found, one of them with the wrong label, and there is one extra box."""
    wanted = [{"bbox_2d": box, "label": "a"} for box in ([0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10])]
    found = [
        {"bbox_2d": [0, 0, 10, 8], "label": "a"},
        {"bbox_2d": [20, 0, 30, 10], "label": "b"},
        {"bbox_2d": [70, 0, 80, 10], "label": "a"},
    ]
    position, label, completeness = 0.8 / 3, 1 / 3, 1 - (1 / 3 + 1 / 3) / 2
    assert detection.weighted_match([as_boxes(found)], [wanted]) == pytest.approx([0.7 * position + 0.3 * completeness])
    score = detection.weighted_match([as_boxes(found)], [wanted], position=1, label=2, completeness=1)
    assert score == pytest.approx([(position + 2 * label + completeness) / 4])


def test_a_box_without_area_matches_nothing():
    """It counts as a wrong box, as in VLM-R1, and the other boxes keep their score."""
    wanted, scores = [[0, 0, 10, 10]], {**dict.fromkeys(SCORES, 0.5), "weighted_match": 0.925}
    for empty in ([5, 5, 5, 9], [9, 0, 1, 10], [0, 10, 10, 0], [10, 10, 0, 0], [0, 0, -10, 10]):
        alone, beside = (as_boxes_of(json.dumps(rows)) for rows in ([empty], [*wanted, empty]))
        for name, expected in scores.items():
            assert SCORES[name]([alone, beside], [wanted] * 2) == pytest.approx([0, expected])
        assert boxes.iou([tuple(empty)], wanted) == [0]


def as_boxes_of(text: str) -> Boxes:
    found = answers.parse_boxes(text)
    assert found is not None
    return found


def vlm_r1_weighted_sum(predicted: list[dict], wanted: list[dict]) -> float:
    """VLM-R1's detection_score with its default weights, one pair of boxes after another."""

    def iou(a: list[int], b: list[int]) -> float:
        width, height = (min(a[axis + 2], b[axis + 2]) - max(a[axis], b[axis]) for axis in (0, 1))
        common = width * height if min(width, height) > 1 else 0
        areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
        return common / (sum(areas) - common) if common else 0.0

    if not predicted or not wanted:
        return float(len(predicted) == len(wanted))
    pairs = [(iou(p["bbox_2d"], w["bbox_2d"]), -i, -j) for i, p in enumerate(predicted) for j, w in enumerate(wanted)]
    position, matches = 0.0, 0
    while pairs and max(pairs)[0] >= 0.5:
        best, i, j = max(pairs)
        pairs = [pair for pair in pairs if pair[1] != i and pair[2] != j]
        position += best * (predicted[-i]["label"].lower() == wanted[-j]["label"].lower())
        matches += 1
    missed, extra = 1 - matches / len(wanted), 1 - matches / len(predicted)
    return 0.7 * position / len(wanted) + 0.3 * (1 - (missed + extra) / 2)


def test_weighted_match_equals_vlm_r1():
    """From the text of the answer: labels in any case, duplicates, and boxes without area."""
    rng, reward = np.random.default_rng(2), build("weighted_match")
    completions, references, expected = [], [], []
    for _ in range(500):
        sides = [some_boxes(rng, rng.integers(0, 6), "abAB") for _ in range(2)]
        wanted, other = (
            [{"bbox_2d": b.astype(int).tolist(), "label": n} for b, n, _ in zip(*side, strict=True)] for side in sides
        )
        near = [{**w, "bbox_2d": [v + int(rng.integers(-4, 5)) for v in w["bbox_2d"]]} for w in wanted if rng.random() < 0.8]
        inverted = [{**box, "bbox_2d": box["bbox_2d"][2:] + box["bbox_2d"][:2]} for box in other[:1]]
        predicted = [*near, *other, *inverted, *near[:1]]
        completions.append(json.dumps([predicted[i] for i in rng.permutation(len(predicted))]))
        references.append(wanted)
        expected.append(vlm_r1_weighted_sum(json.loads(completions[-1]), wanted))
    assert reward(completions, answer=references) == pytest.approx(expected, abs=1e-12)
    assert len(set(expected)) > 100
