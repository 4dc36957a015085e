"""Metrics from first principles, and average precision against pycocotools."""

import json

import numpy as np
import pytest
from PIL import Image
from support.evaluations import given, values

from vlmkernels.cli import main
from vlmkernels.evaluate.coco import CocoAP
from vlmkernels.evaluate.evaluation import Evaluation, Scoring
from vlmkernels.evaluate.statistics import point_value
from vlmkernels.evaluate.vqa import PERIODS_APART, normalize, vqa_accuracy
from vlmkernels.rewards.answers import Boxes


def test_grounding(tmp_path):
    references = ["[0, 0, 10, 10]", [0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10]]
    answers = ["[0, 0, 10, 10]", "<answer>[0, 0, 10, 5]</answer>", "nothing", "[20, 20, 30, 30]"]  # IoU 1, 0.5, unparsed, 0
    got = values(tmp_path, "grounding", references, answers)
    assert got["acc@0.5"] == 0.5
    assert got["acc@0.75"] == 0.25
    assert got["miou"] == pytest.approx(1.5 / 4)
    assert got["parse_failure_rate"] == 0.25
    strict = [f"<answer>{answer.removeprefix('<answer>').removesuffix('</answer>')}</answer>" for answer in answers]
    braces = [answer.replace("[", '{"bbox_2d": [').replace("]", "]}") for answer in strict]
    assert values(tmp_path, "grounding", references, braces, match="vlm-r1")["acc@0.5"] == 0.25  # > 0.5
    assert values(tmp_path, "grounding", references, strict, match="vlmevalkit")["acc@0.5"] == 0.5  # >= 0.5
    assert list(values(tmp_path, "grounding", references, strict, match="lmms-eval"))[:5] == [
        f"acc@{t}" for t in (0.1, 0.3, 0.5, 0.7, 0.9)
    ]


def test_frames(tmp_path):
    rows = [{"prompt": "where?", "image": Image.new("RGB", (200, 100)), "task": "grounding", "answer": [20, 10, 100, 50]}]
    for frame, answer in {"0-1000": [100, 100, 500, 500], "0-1": [0.1, 0.1, 0.5, 0.5], "original": [20, 10, 100, 50]}.items():
        found = Evaluation(given(tmp_path / "p.jsonl", [str(answer)]), rows, Scoring(frame=frame, replicates=2))
        assert found.value("grounding", "miou") == pytest.approx(1)
    scoring = Scoring(frame="resized", replicates=2)
    resized = given(tmp_path / "p.jsonl", ["[10, 20, 50, 100]"], resized=[[100, 200]])
    assert Evaluation(resized, rows, scoring).value("grounding", "miou") == pytest.approx(1)
    outside = given(tmp_path / "p.jsonl", ["[10, 20, 150, 100]"], resized=[[100, 200]])
    assert Evaluation(outside, rows, scoring).value("grounding", "parse_failure_rate") == 1
    with pytest.raises(ValueError, match="sample 0: predictions must hold 'resized'"):
        Evaluation(given(tmp_path / "p.jsonl", ["[10, 20, 50, 100]"]), rows, scoring)


def test_yes_no_equals_pope(tmp_path):
    references = ["yes"] * 4 + ["no"] * 4
    answers = ["Yes.", "yes", "no", "a cat", "no", "No", "yes", "maybe"]  # TP 2, FN 1, 1 unparsed; TN 2, FP 1, 1 unparsed
    got = values(tmp_path, "yes_no", references, answers)
    expected = {
        "accuracy": 4 / 8,
        "precision": 2 / 3,
        "recall": 2 / 4,
        "f1": 4 / 7,
        "yes_ratio": 3 / 8,
        "parse_failure_rate": 2 / 8,
    }
    assert {name: got[name] for name in expected} == pytest.approx(expected)
    always = values(tmp_path, "yes_no", references, ["yes"] * 8)
    assert (always["accuracy"], always["recall"], always["yes_ratio"]) == (0.5, 1.0, 1.0)


def test_formulas_that_cannot_be_parsed_are_counted(tmp_path):
    got = values(tmp_path, "math", ["5", "5", "5"], ["5 cm", "6", "it is unclear"])
    assert (got["accuracy"], got["parse_failure_rate"]) == pytest.approx((1 / 3, 1 / 3))


def test_text_metrics(tmp_path):
    got = values(tmp_path, "ocr", ["12 34", "abcd"], ["12 35", ""])
    assert got["cer"] == pytest.approx((1 + 4) / 9)
    assert got["wer"] == pytest.approx((1 + 1) / 3)
    assert got["exact_match"] == 0
    several = values(tmp_path, "docvqa", [["abcd", "ab"]], ["ax"], metrics=("cer",))
    assert several["cer"] == 0.5
    got = values(tmp_path, "chart", ["100", "yes", "0.25"], ["104.9", "Yes", "25%"])
    assert got["relaxed_accuracy"] == 1
    assert values(tmp_path, "chart", ["100", "100"], ["105", "105.1"])["relaxed_accuracy"] == 0.5
    assert values(tmp_path, "docvqa", [["abcd", "xy"], "abcd"], ["abcx", "xxxd"])["anls"] == pytest.approx((0.75 + 0) / 2)
    assert values(tmp_path, "counting", [4, 4, 0], ["three", "4", "0"])["soft_count"] == pytest.approx((0.75 + 1 + 1) / 3)
    assert values(tmp_path, "choice", ["B", "C"], ["(b)", "The answer is A."])["accuracy"] == 0.5
    assert values(tmp_path, "numeric", [3.5], ["about 3.5"])["accuracy"] == 1
    assert values(tmp_path, "pointing", [[0, 0, 4, 4], [0, 0, 4, 4]], ["(1, 2)", "(5, 2)"])["accuracy"] == 0.5


def test_vqa_accuracy():
    people = ["2"] * 2 + ["3"] * 8
    # Each person is compared with the 9 others: 2 of them see one other "2", and 8 see two.
    assert vqa_accuracy("The two.", people) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert vqa_accuracy("three", people) == 1
    assert normalize("It isnt a dog, no!") == "it isn't dog no"
    assert normalize("He couldnt've; she couldn'tve.") == "he couldn't've she couldn't've"
    assert (normalize("3."), normalize("3.", PERIODS_APART), normalize("3.5")) == ("3", "3.", "3.5")


def test_mme(tmp_path):
    rows = [
        {"prompt": "?", "task": "mme", "answer": answer, "question_id": image, "category": category}
        for category, image in (("count", "a"), ("count", "b"), ("OCR", "a"))
        for answer in ("yes", "no")
    ]
    answers = ["yes", "no", "yes", "yes", "yes", "no"]  # correct: both and one of count, both of OCR
    scoring = Scoring(by="task", replicates=2)
    found = Evaluation(given(tmp_path / "p.jsonl", answers), rows, scoring)
    assert found.value("mme", "mme_score") == pytest.approx((75 + 50) + (100 + 100))
    assert found.value("mme", "mme_accuracy") == pytest.approx(5 / 6)
    assert found.value("mme", "mme_accuracy_plus") == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match=r"question_id 'b' must occur twice within its category, got 1 \(samples 2\)"):
        Evaluation(given(tmp_path / "p.jsonl", answers[:3]), rows[:3], scoring).results  # noqa: B018


def test_chair(tmp_path):
    shown = [["dog", "frisbee"], ["cat"], ["car"]]
    captions = ["A dog catches a frisbee.", "A cat and two dogs.", "Nothing to see."]
    got = values(tmp_path, "caption", shown, captions)
    assert got["chair_i"] == pytest.approx(1 / 4)
    assert got["chair_s"] == pytest.approx(1 / 3)
    assert values(tmp_path, "caption", shown, captions, vocabulary=["frisbee"])["chair_i"] == 0


def test_metrics_of_any_task(tmp_path):
    formatted = "<think>look</think><answer>a</answer>"
    got = values(tmp_path, "exact", ["a", "b"], [[formatted, "b"], ["b", "b"]])
    assert got["accuracy"] == 0.75
    assert got["pass@2"] == 1
    assert got["maj@2"] == 1  # the first of a tie wins
    assert got["format_rate"] == 0.25
    assert "mean_length" not in got  # unknown for saved texts
    known = [[{"text": "a", "length": 3, "truncated": False}], [{"text": "c", "length": 5, "truncated": True}]]
    got = values(tmp_path, "exact", ["a", "b"], known)
    assert (got["mean_length"], got["truncation_rate"]) == (4, 0.5)


# pycocotools


def detections(count: int):
    """Random boxes with two labels, and predictions near them with confidences."""
    rng = np.random.default_rng(3)
    references, predictions = [], []
    for _ in range(count):
        corners = rng.uniform(0, 60, (rng.integers(0, 5), 2))
        sizes = rng.uniform(5, 40, corners.shape)
        labels = [str(label) for label in rng.choice(["cat", "dog"], len(corners))]
        references.append(Boxes(np.hstack([corners, corners + sizes]), labels, [None] * len(corners)))
        moved = np.hstack([corners, corners + sizes]) + rng.normal(0, 3, (len(corners), 4))
        moved = [(a, b, max(c, a + 1), max(d, b + 1)) for a, b, c, d in moved.tolist()] + [(0.0, 0.0, 9.0, 9.0)]
        predictions.append([Boxes(np.array(moved), [*labels, "cat"], rng.random(len(moved)).tolist())])
    return predictions, references


def test_ap_equals_pycocotools_and_a_replicate_equals_a_dataset_with_copies(capsys):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    predictions, references = detections(12)
    ours = CocoAP(predictions, references)
    coco, found = COCO(), []
    annotations = [
        {
            "id": 0,
            "image_id": i,
            "category_id": ["cat", "dog"].index(label) + 1,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
        }
        for i, r in enumerate(references)
        for (x1, y1, x2, y2), label in zip(r.boxes, r.labels, strict=True)
        for box in [[x1, y1, x2 - x1, y2 - y1]]
    ]
    coco.dataset = {
        "info": {},
        "images": [{"id": i} for i in range(12)],
        "categories": [{"id": 1}, {"id": 2}],
        "annotations": [{**a, "id": n} for n, a in enumerate(annotations, 1)],
    }
    coco.createIndex()
    for i, (p,) in enumerate(predictions):
        for (x1, y1, x2, y2), label, score in zip(*p, strict=True):
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "category_id": ["cat", "dog"].index(label) + 1}
            found.append({"image_id": i, "score": score, **box})
    evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    capsys.readouterr()
    assert point_value(ours) == pytest.approx(evaluation.stats[0], abs=1e-12)
    assert point_value(CocoAP(predictions, references, 0.5)) == pytest.approx(evaluation.stats[1], abs=1e-12)
    assert 0.1 < evaluation.stats[0] < 0.9

    copies = np.array([2, 0, 1, 1, 3, 1, 0, 1, 1, 0, 1, 1])
    repeated = [predictions[i] for i in np.repeat(range(12), copies)], [references[i] for i in np.repeat(range(12), copies)]
    assert ours.value(copies[None].astype(float), np.ones((1, 1)))[0] == pytest.approx(
        point_value(CocoAP(*repeated)), abs=1e-12
    )
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("references", "answers", "ap"),
    [
        ([[], []], ["[]", "none"], np.nan),  # no object anywhere
        ([[], []], ["[[0, 0, 9, 9]]", "what?"], np.nan),
        ([[[0, 0, 9, 9]], []], ["[[0, 0, 9, 9]]", "[]"], 1),
        ([[[0, 0, 9, 9]], []], ["[[0, 0, 9, 9]]", "[[0, 0, 9, 9]]"], 1),  # the second box ranks after the last match
        ([[], [[0, 0, 9, 9]]], ["[[0, 0, 9, 9]]", "[[0, 0, 9, 9]]"], 0.5),
        ([[[0, 0, 9, 9]], [[0, 0, 9, 9]]], ["[]", "nothing to read"], 0),
        ([[[0, 0, 9, 9]]], ['[{"bbox_2d": [0, 0, 9, 9], "label": "cat"}]'], 1),  # the reference has no labels
        ([[[0, 0, 9, 9]]], ["[[9, 9, 0, 0], [9, 0, 0, 9], [5, 5, 5, 5], [0, 0, 9, 9]]"], 1 / 4),  # boxes without area are wrong
        (
            ['[{"bbox_2d": [0, 0, 9, 9], "label": "cat"}]'],
            ['[{"bbox_2d": [0, 0, 9, 9], "label": "dog"}, {"bbox_2d": [0, 0, 9, 9], "label": "cat"}]'],
            1,  # a category that is only predicted has no AP
        ),
    ],
)
def test_ap_of_images_without_objects(references, answers, ap, tmp_path):
    got = values(tmp_path, "detection", references, answers)
    assert (got["ap"], got["ap50"]) == pytest.approx((ap, ap), nan_ok=True)
    assert got["parse_failure_rate"] == sum("[" not in answer and answer != "none" for answer in answers) / len(answers)


def test_a_category_without_objects(tmp_path):
    """It has no AP; the other numbers are there. The command reports the same."""
    objects = {"with": [[0, 0, 9, 9]], "without": []}
    rows = [{"prompt": "?", "task": "detection", "category": name, "answer": boxes} for name, boxes in objects.items()]
    predictions = given(tmp_path / "p.jsonl", ["[[0, 0, 9, 9]]", "[]"])
    found = Evaluation(predictions, rows, Scoring(replicates=2))
    assert found.value("with", "ap") == pytest.approx(1)
    assert np.isnan(found.value("without", "ap"))
    assert found.value("without", "parse_failure_rate") == found.value("all", "parse_failure_rate") == 0
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"--predictions": "p.jsonl", "--baseline": "p.jsonl", "--dataset": "t.jsonl", "--output": "o.json"}
    assert main(["eval", *(part for flag, name in flags.items() for part in (flag, str(tmp_path / name)))]) == 0
    metrics = json.loads((tmp_path / "o.json").read_text())["metrics"]
    assert metrics["with"]["ap50"]["value"] == pytest.approx(1)
    assert metrics["without"]["ap50"]["value"] is None


def test_detection(tmp_path):
    reference = '[{"bbox_2d": [0, 0, 10, 10], "label": "cat"}]'
    got = values(tmp_path, "detection", [reference] * 2, [reference, "[]"])
    assert got["ap50"] == pytest.approx(51 / 101)  # precision 1 up to recall 0.5
    assert values(tmp_path, "detection", [reference], ["nothing to box"])["ap"] == 0
