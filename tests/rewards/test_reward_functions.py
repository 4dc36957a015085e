"""Scoring functions: values by hand, comparison with pycocotools, and errors of wrong references."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmkernels.rewards import answers, boxes, detection, hallucination, length, text
from vlmkernels.rewards.answers import Boxes, as_boxes

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("parse", "written", "expected"),
    [
        (answers.find_answer, "<think>a</think><answer> b </answer>", "b"),
        (answers.find_answer, "<think>a</think> b", "b"),
        (answers.find_answer, "b", "b"),
        (answers.find_answer, "<answer>a</answer><answer>a</answer>", None),
        (answers.find_answer, "<answer>a", None),
        (answers.find_answer, "<answer><answer>a</answer>", None),
        (answers.find_answer, "<answer> </answer>", None),
        (answers.find_answer, "a</think>b</think>c", None),
        (answers.parse_number, "about -1,234.5 km", -1234.5),
        (answers.parse_number, "12%", 0.12),
        (answers.parse_number, "1e3", 1000.0),
        (answers.parse_number, "$.50", 0.5),
        (answers.parse_number, "5.", 5.0),
        (answers.parse_number, "3, that is 3.0", 3.0),
        (answers.parse_number, "3 or 4", None),
        (answers.parse_number, "1,2,3", None),
        (answers.parse_number, "v2", None),
        (answers.parse_number, "1e999", None),
        (answers.parse_number, "none", None),
        (answers.parse_count, "There are three.", 3.0),
        (answers.parse_count, "3 (three)", 3.0),
        (answers.parse_count, "two or three", None),
        (answers.parse_count, "one, 2", None),
        (answers.parse_choice, "b", "B"),
        (answers.parse_choice, "(C)", "C"),
        (answers.parse_choice, "B. A cat", "B"),
        (answers.parse_choice, "**B**", "B"),
        (answers.parse_choice, "The answer is D", "D"),
        (answers.parse_choice, "A dog", None),
        (answers.parse_choice, "A. cat B. dog", None),
        (answers.parse_choice, "", None),
        (answers.parse_yes_no, "Yes, it is.", "yes"),
        (answers.parse_yes_no, "no", "no"),
        (answers.parse_yes_no, "yes or no", None),
        (answers.parse_yes_no, "nothing", None),
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
    ],
)
def test_answers(parse, written, expected):
    assert parse(written) == expected


PIECES = st.sampled_from(
    ["<answer>", "</answer>", "<think>", "</think>", "[", "]", "(", "{", "}", ",", ":", '"bbox_2d"', "'label'", "1", "9" * 400,
     "-", ".", "1e999", "NaN", "%", "yes", "no", "three", "A", "B.", "```", "json", "\n", " ", "null", "\\d"]
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(st.text(), st.lists(PIECES, max_size=30).map("".join)))
def test_whatever_a_model_writes_is_an_answer_or_none(text):
    answers.has_format(text, text)
    for name, parse in answers.PARSERS.items():
        value = parse(text)
        assert (
            value is None
            or name in ("text", "choice", "yes_no")
            or np.isfinite(value.boxes if name == "boxes" else value).all()
        )
    answer = answers.find_answer(text)
    assert answer is None or (answer and "<answer>" not in answer)


def test_boxes_of_an_answer():
    found = answers.parse_boxes("[{'Position': [0, 0, 1, 1], 'label': ' Cat', 'Confidence': 0.5}, "
                                "{'Position': [0, 0, 2, 2], 'label': 'dog', 'Confidence': 1}]")  # fmt: skip
    assert found.boxes.tolist() == [[0, 0, 1, 1], [0, 0, 2, 2]]
    assert found.labels == ["cat", "dog"]
    assert found.scores == [0.5, 1]
    assert answers.parse_boxes("[[0, 0, 1, 1], [5, 5, 6, 6]]").boxes.shape == (2, 4)
    assert answers.parse_boxes("one at [0, 0, 1, 1], one at [5, 5, 6, 6]").boxes.shape == (2, 4)
    for none in ("[]", "None", "```json\n[]\n```"):
        assert answers.parse_boxes(none).boxes.shape == (0, 4)
    for wrong in ("nothing", "[[0, 0, 1, 1], [2, 2, 1, 1]]", "[[0, 0, 1, 1], [2, 2]]", "[[0, 0, 1, 1, 2, 2, 3, 3]]", "{}",
                  '[{"bbox_2d": [0, 0, 1, 1], "score": "x"}]', "```\n[]\n```\n```\n[]\n```", "[" * 5000):  # fmt: skip
        assert answers.parse_boxes(wrong) is None


def test_text():
    assert text.exact_match(["a", " b ", None, "c", "C"], ["a", ["x", "b"], "c", None, "c"]) == [1, 1, None, None, 0]
    assert text.exact_match(["C", "12"], ["c", 12], ignore_case=True) == [1, 1]
    assert text.choice(["A", "B"], ["a", "A"]) == [1, 0]
    assert text.yes_no(["yes", "no", "yes"], ["Yes", True, False]) == [1, 0, 0]
    assert text.numeric([1.0, 1.04, -1.0, 0.0], [1, "1", -1.01, 0], abs_tol=0.02, rel_tol=0.01) == [1, 0, 1, 1]
    assert text.count([3, 4, 9, 0], [3, 3, 3, 0]) == [1, 0, 0, 1]
    assert text.count([3, 4, 9, 1], [3, 3, 3, 0], soft=True) == pytest.approx([1, 2 / 3, 0, 0])
    relaxed = text.relaxed_accuracy(
        ["105", "105.1", "25%", "0.0", "Yes", "2021", "-95"], ["100", 100, "0.25", 0, "yes", ["x"], -100]
    )
    assert relaxed == [1, 0, 1, 1, 1, 0, 1]


def test_edit_distances():
    assert text.cer(["sitting", "", "abcdefgh", None], ["kitten", "a", "a", "a"]) == pytest.approx([1 - 3 / 6, 0, 0, None])
    assert text.edit_ratio(["sitting", "", ""], ["kitten", "a", ""]) == pytest.approx([1 - 3 / 7, 0, 1])
    assert text.anls(["ABCD", "abxx", "abxxx", "x"], ["abcd", "abcd", "abcde", ["y", "x"]]) == pytest.approx([1, 0.5, 0, 1])
    assert text.cer(["A"], ["a"], ignore_case=True) == [1]


def test_math():
    predictions = ["1/2", "$x^2+1$", r"\boxed{4}", "x+1", "the answer is 5", "", None]
    references = [r"\frac{1}{2}", "1+x^2", "2+2", "x-1", "5", "3", "3"]
    assert text.math_equal(predictions, references) == [1, 1, 1, 0, 1, 0, None]


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
        "0-1000": [250] * 2 + [500] * 2,
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
    with pytest.raises(ValueError, match="frame must be one of original, resized, 0-1, 0-1000, got 'pixels'"):
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


def test_length_and_repetition():
    scores = length.cosine_length([0, 50, 100, 0, 50, 5], [True, True, True, False, False, None], max_length=100)
    assert scores == pytest.approx([1, 0.75, -1, -1, -0.75, None])
    assert length.soft_overlong([0, 80, 90, 100, 120], max_length=100, cache=20) == [0, 0, -0.5, -1, -1]
    assert length.repetition([[1, 2, 3, 4], [5, 5, 5, 5, 5], [1], []], ngram=2) == [0, -0.75, 0, 0]


def test_chair():
    vocabulary = {"dog": ["puppy"], "hot dog": [], "bus": [], "person": ["man"]}
    captions = ["A man eats two hot dogs.", "Puppies? A puppy and buses.", "A nice day.", "A dog, a dog, a bus"]
    objects = [["person", "hot dog"], ["dog"], ["dog"], ["puppy"]]
    assert hallucination.chair(captions, objects, vocabulary=vocabulary) == [1, 0.5, 0, 0.5]
    assert hallucination.chair(["a dog"], [None], vocabulary=vocabulary) == [None]
    assert hallucination.mentions(captions[:1], objects[:1], vocabulary)[0].mentioned == ["person", "hot dog"]
    with pytest.raises(TypeError, match=r"references\[0\] must be a list of names, got 'dog'"):
        hallucination.chair(["a dog"], ["dog"], vocabulary=vocabulary)


@pytest.mark.parametrize(
    ("score", "prediction", "reference", "message"),
    [
        (text.exact_match, "a", {"a": 1}, "must be a string or number, got dict"),
        (text.exact_match, "a", [], r"must be a string or a list with at least one string, got \[\]"),
        (text.numeric, 1.0, "cat", "must be a number, got 'cat'"),
        (text.count, 1.0, math.nan, "must be a finite number, got nan"),
        (text.yes_no, "yes", "maybe", "must be yes or no, got 'maybe'"),
        (text.choice, "A", "cat", "must be an option letter, got 'cat'"),
        (boxes.iou, (0, 0, 1, 1), [[0, 0, 1, 1], [0, 0, 1, 1]], r"must be one box \(x1, y1, x2, y2\), got 2"),
        (boxes.iou, (0, 0, 1, 1), [5, 0, 1, 1], r"must have finite boxes with x1 < x2 and y1 < y2, got \[5.0, 0.0, 1.0, 1.0\]"),
        (boxes.iou, (0, 0, 1, 1), [0, 0, 1, math.nan], "must have finite boxes with x1 < x2 and y1 < y2, got"),
        (boxes.iou, (0, 0, 1, 1), [0, 0, 1], r"must be boxes of 4 numbers, got \[0, 0, 1\]"),
        (boxes.iou, (0, 0, 1, 1), "cat", r"must be boxes \(x1, y1, x2, y2\), got 'cat'"),
        (detection.matched_iou, as_boxes([]), [{"label": "cat"}], "must have bbox_2d or bbox or box or Position, .*, got"),
    ],
)  # fmt: skip
def test_wrong_references_are_named(score, prediction, reference, message):
    with pytest.raises((ValueError, TypeError), match=rf"references\[1\] {message}"):
        score([None, prediction], [reference, reference])


def test_wrong_options():
    for call, message in (
        (
            lambda: detection.matched_iou([as_boxes([])], [[]], matching="best"),
            "matching must be one of confidence, greedy, hungarian",
        ),
        (lambda: detection.matched_iou([as_boxes([])], [[]], threshold=2), r"threshold must be in \[0, 1\], got 2"),
        (lambda: detection.mean_ap([as_boxes([])], [[]], thresholds=[]), r"thresholds must be in \(0, 1\], got \[\]"),
        (lambda: detection.weighted_match([as_boxes([])], [[]], position=-1), "position, label, completeness must be >= 0"),
        (lambda: text.numeric([1.0], [1], rel_tol=-1), "rel_tol must be >= 0, got -1"),
        (lambda: text.cer(["a"], []), "predictions must have one entry per reference, 0, got 1"),
        (lambda: length.soft_overlong([1], max_length=10, cache=11), r"cache must be in \(0, max_length = 10\], got 11"),
        (lambda: length.repetition([[1]], ngram=0), "ngram must be >= 1, got 0"),
        (lambda: hallucination.chair(["a"], [[]], vocabulary=[]), r"vocabulary must name at least one object, got \[\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_json_of_a_dataset_is_read():
    row = json.dumps([{"bbox_2d": [0, 0, 2, 2], "label": "cat"}])
    assert detection.matched_iou([as_boxes(row)], [row]) == [1]
    assert as_boxes(np.array([[0, 0, 1, 1]])).boxes.tolist() == [[0, 0, 1, 1]]


def test_third_party_packages_are_imported_where_they_are_used():
    code = (
        "import sys\n"
        "for name in ('torchvision', 'torchvision.ops', 'scipy', 'rapidfuzz', 'math_verify', 'transformers', 'PIL'):\n"
        "    sys.modules[name] = None\n"
        "import vlmkernels.rewards as rewards\n"
        "assert not any(name.startswith('vlmkernels.train') for name in sys.modules)\n"
        "found = rewards.Rewards(['exact_match', 'think_answer_format'])(1, completions=['a'], answer=['a'])\n"
        "assert found.rewards.tolist() == [[1, 0]]\n"
        "try:\n"
        "    rewards.Rewards('cer')\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "cer needs the package rapidfuzz: pip install 'vlmkernels[rewards]'\n"
