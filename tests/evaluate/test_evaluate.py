"""Evaluation: metrics against first principles, pycocotools, scipy and lmms-eval; predictions that resume; the page."""

import itertools
import json
import multiprocessing
import os
import re
import signal
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import harnesses, tiny

from vlmkernels.cli import main
from vlmkernels.data.samples import read_sample
from vlmkernels.evaluate.coco import CocoAP
from vlmkernels.evaluate.evaluation import Evaluation, Scoring
from vlmkernels.evaluate.predictions import Decoding, Predictions, hidden, predict
from vlmkernels.evaluate.statistics import Bootstrap, Sums, compare, estimate, majority_at_k, mean_of, pass_at_k, point_value
from vlmkernels.evaluate.tasks import HARNESSES, TASKS
from vlmkernels.evaluate.vqa import normalise, vqa_accuracy
from vlmkernels.rewards.answers import Boxes

torch.set_num_threads(1)
RNG = np.random.default_rng(0)


def given(path: Path, completions: list, **more) -> Predictions:
    """Saved predictions: a text, or a list of texts, per sample."""
    lines = [
        json.dumps({"index": i, **({"completions": c} if isinstance(c, list) else {"completion": c}), **more})
        for i, c in enumerate(completions)
    ]
    path.write_text("\n".join(lines) + "\n")
    return Predictions.read(path)


def values(
    tmp_path, task: str, references: list, completions: list, columns: dict | None = None, **scoring
) -> dict[str, float]:
    """Every metric of a task of one group."""
    rows = [{"prompt": "what?", "task": task, TASKS[task].column: r, **(columns or {})} for r in references]
    options = {"replicates": 2, **scoring}
    evaluation = Evaluation(given(tmp_path / "p.jsonl", completions), rows, Scoring(**options))
    return {result.metric: result.estimate.value for result in evaluation.results}


# Statistics


def test_interval_is_scipys():
    from scipy.stats import bootstrap

    scores = RNG.random(40)
    theirs = bootstrap((scores,), np.mean, n_resamples=20_000, method="percentile", rng=0).confidence_interval
    ours = estimate(mean_of(scores[:, None]), Bootstrap(replicates=20_000))
    assert ours.value == pytest.approx(scores.mean())
    assert ours[1:3] == pytest.approx(tuple(theirs), abs=0.004)
    assert ours.num_samples == 40


def test_interval_of_a_ratio_of_sums_resamples_both():
    statistics = np.stack([RNG.integers(0, 5, 30), RNG.integers(5, 9, 30)], 1).astype(float)
    ours = estimate(Sums(statistics[:, None], lambda t: t[:, 0] / t[:, 1]), Bootstrap(replicates=4000))
    drawn = RNG.integers(30, size=(4000, 30))
    theirs = np.quantile(statistics[drawn, 0].sum(1) / statistics[drawn, 1].sum(1), [0.025, 0.975])
    assert ours[1:3] == pytest.approx(tuple(theirs), abs=0.01)


def test_not_scored_is_left_out():
    scores = np.array([[1.0, np.nan], [0.0, 1.0], [np.nan, np.nan]])
    assert point_value(mean_of(scores)) == pytest.approx(2 / 3)
    assert np.isnan(estimate(mean_of(np.full((3, 1), np.nan))).low)


def test_runs_widen_the_interval_where_runs_differ():
    scores = np.array([[0.0, 1.0]]) + np.zeros((50, 1))  # two seeds that disagree on everything
    alone = estimate(mean_of(scores))
    crossed = estimate(mean_of(scores), Bootstrap(runs=2))
    assert alone[:3] == (0.5, 0.5, 0.5)
    assert crossed[:3] == (0.5, 0.0, 1.0)


def test_mcnemar_and_paired_bootstrap():
    from scipy.stats import binomtest

    ours = np.array([1] * 12 + [0] * 3 + [1] * 20 + [0] * 5, float)[:, None]
    theirs = np.array([0] * 12 + [1] * 3 + [1] * 20 + [0] * 5, float)[:, None]
    result = compare(mean_of(ours), mean_of(theirs))
    assert result.test == "McNemar"
    assert result.p_value == pytest.approx(binomtest(12, 15).pvalue)
    assert result.value == pytest.approx(9 / 40)
    assert result.low < 9 / 40 < result.high
    same = compare(mean_of(ours), mean_of(ours))
    assert (same.value, same.p_value) == (0.0, 1.0)

    iou = RNG.random((60, 1))
    better = compare(mean_of(iou + 0.1 + 0.05 * RNG.standard_normal((60, 1))), mean_of(iou))
    assert better.test == "paired bootstrap"
    assert better.p_value < 0.01
    assert better.low > 0
    alike = compare(mean_of(iou + 0.3 * RNG.standard_normal((60, 1))), mean_of(iou))
    assert alike.low < 0 < alike.high
    assert alike.p_value > 0.05


@pytest.mark.parametrize(("n", "k"), [(1, 1), (4, 1), (5, 3), (6, 6)])
def test_pass_at_k_is_the_mean_over_all_subsets(n, k):
    correct = np.array([[float(i < c) for i in range(n)] for c in range(n + 1)])
    subsets = list(itertools.combinations(range(n), k))
    expected = [np.mean([row[list(subset)].any() for subset in subsets]) for row in correct]
    np.testing.assert_allclose(pass_at_k(correct, k), expected, atol=1e-12)


def test_majority():
    answers = [["a", "b", "b", None], ["a", "b", "c", "d"], [None, None, None, "x"], [None] * 4]
    correct = np.array([[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]], float)
    np.testing.assert_array_equal(majority_at_k(answers, correct, 4), [1, 1, 1, 0])  # of a tie the first; None has no vote
    np.testing.assert_array_equal(majority_at_k(answers, correct, 2), [0.5, 0.5, 0.5, 0])


# Metrics, from first principles


def test_grounding(tmp_path):
    references = ["[0, 0, 10, 10]", [0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10]]
    answers = ["[0, 0, 10, 10]", "<answer>[0, 0, 10, 5]</answer>", "nothing", "[20, 20, 30, 30]"]  # IoU 1, 0.5, unreadable, 0
    got = values(tmp_path, "grounding", references, answers)
    assert got["acc@0.5"] == 0.5
    assert got["acc@0.75"] == 0.25
    assert got["miou"] == pytest.approx(1.5 / 4)
    assert got["parse_failure_rate"] == 0.25
    strict = [f"<answer>{answer.removeprefix('<answer>').removesuffix('</answer>')}</answer>" for answer in answers]
    assert values(tmp_path, "grounding", references, strict, match="vlm-r1")["acc@0.5"] == 0.25  # > 0.5
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


def test_yes_no_is_popes(tmp_path):
    references = ["yes"] * 4 + ["no"] * 4
    answers = ["Yes.", "yes", "no", "a cat", "no", "No", "yes", "maybe"]  # TP 2, FN 1 and 1 unread; TN 2, FP 1, 1 unread
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
    # Left out one at a time: a person who said "two" leaves 1 other, of 8 who said "3" each leaves 2.
    assert vqa_accuracy("The two.", people) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert vqa_accuracy("three", people) == 1
    assert normalise("It isnt a dog, no!") == "it isn't dog no"


def test_mme(tmp_path):
    rows = [
        {"prompt": "?", "task": "mme", "answer": answer, "question_id": image, "category": category}
        for category, image in (("count", "a"), ("count", "b"), ("OCR", "a"))
        for answer in ("yes", "no")
    ]
    answers = ["yes", "no", "yes", "yes", "yes", "no"]  # count: both, one; OCR: both
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


def test_whatever_the_task(tmp_path):
    formatted = "<think>look</think><answer>a</answer>"
    got = values(tmp_path, "exact", ["a", "b"], [[formatted, "b"], ["b", "b"]])
    assert got["accuracy"] == 0.75
    assert got["pass@2"] == 1
    assert got["maj@2"] == 1  # a tie: the first
    assert got["format_rate"] == 0.25
    assert "mean_length" not in got  # not known of saved texts
    known = [[{"text": "a", "length": 3, "truncated": False}], [{"text": "c", "length": 5, "truncated": True}]]
    got = values(tmp_path, "exact", ["a", "b"], known)
    assert (got["mean_length"], got["truncation_rate"]) == (4, 0.5)


# pycocotools


def detections(count: int):
    """Random boxes of two labels, and predictions near them with confidences."""
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


def test_ap_is_pycocotools_and_a_replicate_is_a_dataset_with_copies(capsys):
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


def test_detection(tmp_path):
    reference = '[{"bbox_2d": [0, 0, 10, 10], "label": "cat"}]'
    got = values(tmp_path, "detection", [reference] * 2, [reference, "[]"])
    assert got["ap50"] == pytest.approx(51 / 101)  # precision 1 up to recall 0.5
    assert values(tmp_path, "detection", [reference], ["nothing to box"])["ap"] == 0


# Harnesses


def test_match_says_what_each_harness_does(tmp_path):
    """Where they differ: what counts as an answer, what is left out, and an IoU of exactly one half."""
    references, answers = ["yes", "yes", "no", "no"], ["yes", "yes, it is", "no", "who knows"]
    ours = values(tmp_path, "yes_no", references, answers)
    lmms = values(tmp_path, "yes_no", references, answers, match="lmms-eval")
    assert (ours["accuracy"], ours["recall"], ours["yes_ratio"]) == (0.75, 1.0, 0.5)
    assert (lmms["accuracy"], lmms["recall"], lmms["yes_ratio"]) == (0.5, 1.0, 0.5)
    skewed = ["yes", "yes", "yes", "no"]
    lmms = values(tmp_path, "yes_no", skewed, ["no", "what", "yes", "no"], match="lmms-eval")
    assert (lmms["recall"], lmms["yes_ratio"]) == (0.5, 0.75)  # not read: left out; the ratio is that of the references
    ours = values(tmp_path, "yes_no", skewed, ["no", "what", "yes", "no"])
    assert (ours["recall"], ours["yes_ratio"]) == pytest.approx((1 / 3, 0.25))

    assert (
        values(tmp_path, "mme", ["yes", "no"], ["Yes!", "N"], match="lmms-eval", columns={"question_id": 1})["mme_accuracy"]
        == 1
    )
    zero = values(tmp_path, "chart", ["0", "1,000"], ["0.0", "1000"])
    assert zero["relaxed_accuracy"] == 1
    for harness in ("lmms-eval", "vlmevalkit"):  # what Python's float does not take, and a reference of 0, are texts
        assert values(tmp_path, "chart", ["0", "1,000"], ["0.0", "1000"], match=harness)["relaxed_accuracy"] == 0
    spread = "a   b   c   d"  # the distance is taken of "a b c d", the length (lmms-eval) of this
    assert values(tmp_path, "docvqa", ["a b c x"], [spread], match="vlmevalkit")["anls"] == pytest.approx(1 - 1 / 7)
    assert values(tmp_path, "docvqa", ["a b c x"], [spread], match="lmms-eval")["anls"] == pytest.approx(1 - 1 / 13)


needs_lmms_eval = pytest.mark.skipif(not harnesses.INSTALLED, reason=f"lmms-eval is not in {harnesses.LMMS_EVAL.parent}")


@needs_lmms_eval
def test_lmms_eval_pope_and_mme(tmp_path):
    words = ["yes", "Yes ", "no", "No.", "y", "it is not", "yes, a cat", "no"]
    references, answers = [["yes", "no"][i] for i in RNG.integers(2, size=60)], [words[i] for i in RNG.integers(8, size=60)]
    pope, mme = harnesses.load("tasks/pope/utils.py"), harnesses.load("tasks/mme/utils.py")
    theirs = [
        pope.pope_process_results({"answer": r, "question_id": 0}, [a])["pope_accuracy"]
        for r, a in zip(references, answers, strict=True)
    ]
    got = values(tmp_path, "yes_no", references, answers, match="lmms-eval")
    for ours, name in {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "f1_score"}.items():
        assert got[ours] == pytest.approx(getattr(pope, f"pope_aggregate_{name}")(theirs), abs=1e-12), ours
    assert got["yes_ratio"] == pytest.approx(pope.pope_aggregate_yes_ratio(theirs))

    docs = [
        {"answer": r, "question_id": f"q{i // 2}", "category": ("count", "color")[i % 4 // 2]} for i, r in enumerate(references)
    ]
    rows = [{"prompt": "?", "task": "mme", **doc} for doc in docs]
    found = Evaluation(given(tmp_path / "p.jsonl", answers), rows, Scoring(match="lmms-eval", by="task", replicates=2))
    theirs = [mme.mme_process_results(d, [a])["mme_perception_score"] for d, a in zip(docs, answers, strict=True)]
    assert found.value("mme", "mme_score") == pytest.approx(mme.mme_aggregate_results(theirs))


@needs_lmms_eval
def test_lmms_eval_boxes(tmp_path):
    rec = harnesses.load("tasks/refcoco/utils_rec.py")
    corners = RNG.random((40, 4)).round(2).tolist()
    boxes = [[*sorted(c[:2]), *sorted(c[2:])] for c in corners]
    references = [[x1, y1, x2 + 0.01, y2 + 0.01] for x1, x2, y1, y2 in boxes]
    shifted = [[round(v + d, 3) for v, d in zip(r, RNG.normal(0, 0.05, 4).tolist(), strict=True)] for r in references]
    answers = [f"The box is {box}." if i % 7 else "none" for i, box in enumerate(shifted)]
    got = values(tmp_path, "grounding", references, answers, match="lmms-eval")
    theirs = [{"bbox": r, "pred": rec.parse_float_sequence_within(a)} for r, a in zip(references, answers, strict=True)]
    for ours, name in {"miou": "IoU", **{f"acc@{t}": f"ACC@{t}" for t in (0.1, 0.3, 0.5, 0.7, 0.9)}}.items():
        assert got[ours] == pytest.approx(rec.refcoco_bbox_rec_aggregation_result(theirs, name), abs=1e-6), ours
    assert 0.2 < got["acc@0.5"] < 1


@needs_lmms_eval
def test_lmms_eval_text(tmp_path):
    chart, metrics, vqa = (harnesses.load(p) for p in ("tasks/chartqa/utils.py", "api/metrics.py", "tasks/vqav2/utils.py"))
    references = ["10", "0", "25%", "yes", "1,000", "3.1"]
    answers = ["10.4", "0.0", "0.26", "YES", "1000", "3"]
    expected = np.mean([chart.relaxed_correctness(a, r) for a, r in zip(answers, references, strict=True)])
    assert values(tmp_path, "chart", references, answers, match="lmms-eval")["relaxed_accuracy"] == pytest.approx(expected)

    references = [["red car", "a car"], ["12  May"], ["xyz"]]
    answers = ["Red  cat", "12 may", "abc"]
    expected = np.mean([metrics.anls(r, [a])["anls"] for r, a in zip(references, answers, strict=True)])
    assert values(tmp_path, "docvqa", references, answers, match="lmms-eval")["anls"] == pytest.approx(expected)

    answers = ["The two dogs.", "dont know", "red,blue", "5.0", "1,000!", "a cat/dog", "no - never", "none"]
    people = [["2 dogs"] * 2 + ["dogs"] * 8, ["don't know"] * 3 + ["no"] * 7, ["red blue"] * 10, ["5.0"] * 4 + ["5"] * 6]
    people += [["1000"] * 9 + ["1"], ["cat dog"] * 2 + ["catdog"] * 8, ["no never"] * 10, ["0"] * 10]
    for answer, ten in zip(answers, people, strict=True):
        doc = {"question_id": 0, "answers": [{"answer": a, "answer_id": i} for i, a in enumerate(ten)]}
        assert vqa_accuracy(answer, ten) == pytest.approx(vqa.vqav2_process_results(doc, [answer])["exact_match"]), answer


# Predictions


def sampling(path: Path):
    """Arguments of predict: two completions of five samples."""
    decoding = Decoding(num_generations=2, temperature=1.0, max_completion_length=4, batch_size=2)
    return tiny.vlm(), tiny.processor(), tiny.rows(5, "mixed"), decoding, path


def die_in_the_third_line(path: Path) -> None:
    append = Predictions.append

    def append_or_die(self, *batch):
        append(self, *batch)
        if len(self.by_sample) == 2:
            with self.path.open("a") as file:
                file.write('{"index": 2, "view": "ima')
            os.kill(os.getpid(), signal.SIGKILL)

    Predictions.append = append_or_die
    predict(*sampling(path))


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "killed.jsonl"
    run = multiprocessing.get_context("fork").Process(target=die_in_the_third_line, args=(path,))
    run.start()
    run.join(120)
    assert run.exitcode == -signal.SIGKILL
    kept = path.read_text().splitlines()
    assert len(kept) == 1 + 2 + 1  # settings, two samples, a line that was cut off

    arguments = sampling(path)
    sampled = []
    predictions = predict(*arguments, progress=lambda done, total: sampled.append((done, total)))
    assert sampled == [(3, 5), (4, 5), (5, 5)]
    lines = path.read_text().splitlines()
    assert lines[:3] == kept[:3]
    assert [json.loads(line)["index"] for line in lines[1:]] == [0, 1, 2, 3, 4]
    whole = predict(*sampling(tmp_path / "whole.jsonl"))
    assert whole.by_sample == predictions.by_sample
    assert len({completion.text for group in whole.by_sample.values() for completion in group}) > 2
    assert Predictions.read(path).by_sample == whole.by_sample

    model, processor, data, _, _ = arguments
    other = Decoding(num_generations=2, temperature=0.5, max_completion_length=4)
    with pytest.raises(ValueError, match=r"killed.jsonl was made with other settings: temperature 1.0, now 0.5"):
        predict(model, processor, data, other, path)
    model.lm_head.weight.data[0] += 1
    with pytest.raises(ValueError, match="other settings: model "):
        predict(*arguments)
    assert path.read_text().splitlines() == lines


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "num_generations": 3, "seed": 5}], ids=["greedy", "sampled"])
def test_the_same_whatever_the_batch_size(tmp_path, options):
    model, processor, rows = tiny.vlm(), tiny.processor(), tiny.rows(7, "mixed")
    found = [
        predict(
            model, processor, rows, Decoding(max_completion_length=6, batch_size=size, **options), tmp_path / f"{size}.jsonl"
        )
        for size in (1, 4, 7)
    ]
    assert found[0].by_sample == found[1].by_sample == found[2].by_sample
    if options:
        other = Decoding(max_completion_length=6, **{**options, "seed": 6})
        assert predict(model, processor, rows, other, tmp_path / "other.jsonl").by_sample != found[0].by_sample


def test_hidden_images(tmp_path):
    rows = tiny.rows(2, "one")
    sample = read_sample(rows[0], 0)
    grey = hidden(sample, "grey")
    assert [image.size for image in grey.images] == [image.size for image in sample.images]
    assert grey.images[0].getcolors() == [(28 * 28, (128, 128, 128))]
    none = hidden(sample, "none")
    assert none.images == []
    assert [part["type"] for part in none.prompt[0]["content"]] == ["text"]
    predictions = predict(
        tiny.vlm(), tiny.processor(), rows, Decoding(max_completion_length=2), tmp_path / "p", ("image", "none")
    )
    assert {view for _, view in predictions.by_sample} == {"image", "none"}
    with pytest.raises(ValueError, match="sample 0: prompt must be a conversation to take images out of it"):
        hidden(read_sample({"prompt": "<|image_pad|>what?", "image": rows[0]["image"]}, 0), "none")


def test_blind_accuracy(tmp_path):
    rows = [{"prompt": "?", "task": "exact", "answer": "a"}] * 8
    path = tmp_path / "p.jsonl"
    lines = [{"index": i, "completion": "a"} for i in range(8)] + [
        {"index": i, "view": "grey", "completion": "ab"[i > 1]} for i in range(8)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    result = Evaluation(Predictions.read(path), rows, Scoring()).results[0]
    assert (result.metric, result.estimate.value, result.hidden.value, result.cost.value) == ("accuracy", 1.0, 0.25, 0.75)
    assert result.cost.p_value == pytest.approx(2 * 0.5**6)


# Bad input


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "p.jsonl, line 1: must be JSON, got '{'"),
        (["[1]"], "p.jsonl, line 1: must be a JSON object"),
        (['{"completion": "a"}'], "p.jsonl, line 1: index must be a sample's number, from 0, got None"),
        (['{"index": 0}'], "p.jsonl, line 1: completions must be a list of at least one, got None"),
        (['{"index": 0, "completions": [3]}'], "p.jsonl, line 1: completion must be a text or an object with one, got 3"),
        (['{"index": 0, "completion": "a"}'] * 2, "p.jsonl, line 2: index must occur once, got 0"),
        (['{"index": 0, "completion": "a"}'], "sample 1: .*p.jsonl has no completion of it"),
        (
            ['{"index": 0, "completion": "a"}', '{"index": 1, "completions": ["a", "b"]}'],
            "sample 1: must have 1 completions as",
        ),
        (
            [f'{{"index": {i}, "completion": "a"}}' for i in range(3)],
            "predictions must be of the dataset's 2 samples, got index 2",
        ),
    ],
)
def test_bad_predictions(tmp_path, lines, message):
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises((ValueError, TypeError), match=message):
        Evaluation(Predictions.read(path), [{"prompt": "?", "answer": "a"}] * 2)


@pytest.mark.parametrize(
    ("rows", "scoring", "message"),
    [
        (
            [{"task": "grounding", "answer": [0, 0, 1, 1]}, {"task": "grounding", "answer": "left"}],
            {},
            "sample 1: answer must be ",
        ),
        ([{"task": "grounding", "answer": [3, 0, 1, 1]}], {}, r"sample 0: answer must have boxes with x1 < x2"),
        (
            [{"task": "yes_no", "answer": "yes"}, {"task": "yes_no", "answer": 7}],
            {},
            "sample 1: answer must be yes or no, got 7",
        ),
        ([{"task": "counting", "answer": "some"}], {}, "sample 0: answer must be a number, got 'some'"),
        ([{"task": "vqa", "answer": "two"}], {}, "sample 0: answer must be a list of people's answers, got str"),
        ([{"task": "exact", "answer": None}], {}, "sample 0: answer must be given, got None"),
        ([{"task": "caption", "objects": "cat"}], {}, "sample 0: objects must be a list of names"),
        (
            [{"task": "caption", "answer": ["cat"]}],
            {},
            "sample 0: dataset must have a column 'objects' for the task caption, got ",
        ),
        ([{"task": "exact", "answer": "a"}, {"answer": "a"}], {}, "sample 1: task must be one of exact, choice, .*, got None"),
        ([{"task": "groundin", "answer": "a"}], {}, r"sample 0: task must be one of .* \(did you mean grounding\?\)"),
        ([{"answer": "a"}], {"task": "ocrr"}, "task must be one of exact, .*, got 'ocrr'"),
        ([{"answer": "a"}], {"metrics": ("acc@2",)}, "metric must be one of exact_match, .*acc@<IoU>.*, got 'acc@2'"),
        ([{"answer": "a"}], {"metrics": ("precison",)}, r"got 'precison' \(did you mean precision\?\)"),
        ([{"answer": "a"}], {"metrics": ("miou",)}, r"metric miou needs a task of grounding \(box answers\), got exact"),
        ([{"answer": "a"}], {"metrics": ("pass@2",)}, "metric pass@2 must take at most the 1 completions of a sample, got 2"),
        (
            [{"answer": "a"}],
            {"metrics": ("vqa_accuracy",)},
            r"metric vqa_accuracy needs a task of vqa \(vqa answers\), got exact",
        ),
        ([{"answer": "a"}], {"match": "lmms"}, "match must be one of vlmkernels, lmms-eval, vlmevalkit, vlm-r1, got 'lmms'"),
        ([{"answer": "a"}], {"by": "kind"}, r"by must be a column of the dataset \(prompt, answer\), got 'kind'"),
        ([{"answer": "a"}], {"confidence": 95}, r"confidence must be in \(0, 1\), got 95"),
        ([{"question": "?", "answer": "a"}], {}, "sample 0: dataset must have a column 'prompt', got question, answer"),
        ([], {}, "dataset must hold at least one sample, got 0"),
    ],
)
def test_bad_datasets(tmp_path, rows, scoring, message):
    rows = [row if "question" in row else {"prompt": "?", **row} for row in rows]
    with pytest.raises((ValueError, TypeError), match=message):
        Evaluation(given(tmp_path / "p.jsonl", ["a"] * len(rows)), rows, Scoring(**scoring))


def test_rows_of_datasets(tmp_path):
    """A datasets.Dataset with images gives what a list of rows does, and saves to a folder that the command line reads."""
    from datasets import Dataset

    rows = [{**row, "task": "ocr"} for row in tiny.rows(4, "one")]
    stored = Dataset.from_list(rows)
    saved = given(tmp_path / "p.jsonl", ["0", "1", "x", "3"])
    ours, theirs = (Evaluation(saved, data, Scoring(replicates=2)) for data in (stored, rows))
    assert ours.value("ocr", "exact_match") == theirs.value("ocr", "exact_match") == 0.75
    assert ours.rows.sample(1).images[0].tobytes() == rows[1]["image"].tobytes()
    stored.save_to_disk(tmp_path / "data")
    flags = ["--dataset", str(tmp_path / "data"), "--count", "3", "--predictions", str(tmp_path / "three.jsonl")]
    given(tmp_path / "three.jsonl", ["0", "1", "x"])
    assert main(["eval", *flags, "--reward", "cer", "--output", str(tmp_path / "eval.json")]) == 0
    result = json.loads((tmp_path / "eval.json").read_text())
    assert result["metrics"]["ocr"]["exact_match"]["value"] == pytest.approx(2 / 3)
    assert result["rewards"] == {"cer": pytest.approx(2 / 3)}


def test_bad_decoding():
    with pytest.raises(ValueError, match="temperature must be > 0 for several completions"):
        Decoding(num_generations=2)
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        Decoding(batch_size=0)


# The command line and the page


class Structure(HTMLParser):
    """Whether every element is closed, and what a page loads from elsewhere."""

    VOID = ("meta", "img", "br", "input", "path", "rect", "circle", "polygon", "polyline", "line")

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.count = [], [], {}

    def handle_starttag(self, tag, attributes):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.loads += [v for k, v in attributes if k in ("src", "href") and not v.startswith("data:")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def structure(path: Path) -> Structure:
    page = Structure()
    page.feed(path.read_text())
    assert page.open == []
    assert page.loads == []
    return page


@pytest.fixture(scope="module")
def suite_runs(tmp_path_factory):
    """Predictions of the first 60 samples of shapes-and-digits: nearly right, and half right."""
    from vlmkernels.evaluate.shapes_and_digits import Split

    folder, rows = tmp_path_factory.mktemp("suite"), Split("test", 60)
    answers = [rows[i]["answer"] for i in range(60)]
    for name, wrong in (("good", 10), ("poor", 2)):
        lines = [
            {"index": i, "completions": [a if (i // 6) % wrong else "<b>&wrong" for _ in range(2)]}
            for i, a in enumerate(answers)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_saved_predictions_of_the_suite(suite_runs, tmp_path, capsys):
    output = tmp_path / "out" / "eval.json"
    log = [{"step": s, "reward": s / 10, "rewards/iou/mean": s / 5, "reward_std": s, "loss": 1.0} for s in (1, 2, 3)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    files = ["--predictions", str(suite_runs / "good.jsonl"), "--baseline", str(suite_runs / "poor.jsonl")]
    dataset = ["--dataset", "shapes-and-digits", "--count", "60", "--log", str(tmp_path / "trainer_state.json")]
    assert main(["eval", *files, *dataset, "--samples", "3", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert result["num_samples"] == 60
    assert result["accuracy"] == result["metrics"]["all"]["accuracy"]["value"] == pytest.approx(0.9)
    assert set(result["metrics"]) == {"all", "counting", "colour", "spatial", "grounding", "ocr", "negation"}
    grounding = result["metrics"]["grounding"]
    assert grounding["miou"]["low"] <= grounding["miou"]["value"] <= grounding["miou"]["high"]
    assert result["difference"]["all"]["accuracy"]["value"] == pytest.approx(0.4)
    assert result["difference"]["all"]["accuracy"]["p_value"] < 0.01
    assert "accuracy (exact match): 90.0 %" in capsys.readouterr().out
    text = output.with_suffix(".md").read_text()
    assert re.search(r"\| grounding \| miou \| 0.9|\| grounding \| miou \| 90.0 % \|", text)
    assert "paired by sample" in text
    page = structure(output.with_suffix(".html"))
    assert page.count["img"] == 6 * 3  # three samples of each category
    assert page.count["polyline"] == 2  # reward and rewards/iou/mean
    html = output.with_suffix(".html").read_text()
    assert html.count('<rect class="reference"') == 3
    assert '<rect class="prediction"' in html
    assert "&lt;b&gt;&amp;wrong" in html
    assert "<b>&wrong" not in html


def test_several_checkpoints_and_several_seeds(suite_runs, tmp_path):
    for step in (10, 20):
        tiny.vlm(seed=step).save_pretrained(tmp_path / f"checkpoint-{step}")
        tiny.processor().save_pretrained(tmp_path / f"checkpoint-{step}")
    for index, row in enumerate(tiny.rows(3, "one")):
        row["image"].save(tmp_path / f"{index}.png")
        with (tmp_path / "data.jsonl").open("a") as file:
            file.write(json.dumps({**row, "image": f"{index}.png"}) + "\n")
    models = ["--model", str(tmp_path / "checkpoint-10"), "--model", str(tmp_path / "checkpoint-20")]
    flags = ["--dataset", str(tmp_path / "data.jsonl"), "--max_completion_length", "4", "--hide", "grey", "--reward", "cer"]
    output = tmp_path / "eval.json"
    assert main(["eval", *models, *flags, "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert [entry["step"] for entry in result["steps"]] == [10, 20]
    assert {"hidden", "cost"} < set(result["metrics"]["exact"]["accuracy"])
    assert 0 <= result["metrics"]["exact"]["rewards/cer"]["value"] <= 1
    assert structure(output.with_suffix(".html")).count["polyline"] >= 1
    files = sorted(tmp_path.glob("eval-*.jsonl"))
    assert len(files) == 2  # one of each model
    before = [file.stat().st_mtime_ns for file in files]
    assert main(["eval", *models, *flags, "--output", str(output)]) == 0
    assert [file.stat().st_mtime_ns for file in files] == before  # nothing was sampled again

    seeds = ["--predictions", str(suite_runs / "good.jsonl"), "--predictions", str(suite_runs / "poor.jsonl")]
    output = tmp_path / "seeds.json"
    assert main(["eval", *seeds, "--dataset", "shapes-and-digits", "--count", "60", "--output", str(output)]) == 0
    accuracy = json.loads(output.read_text())["metrics"]["all"]["accuracy"]
    assert accuracy["value"] == pytest.approx(0.7)
    assert accuracy["high"] - accuracy["low"] > 0.35  # the runs differ by 0.4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--predictions", "p", "--dataset", "nowhere.jsonl"], "--dataset: dataset must be an existing file .*nowhere.jsonl"),
        (["--dataset", "shapes-and-digits"], "--model or --predictions must be given, one of them"),
        (
            ["--predictions", "p", "--dataset", "shapes-and-digits", "--split", "all"],
            "split must be one of train, dev, test, got 'all'",
        ),
        (
            ["--predictions", "p", "--dataset", "shapes-and-digits", "--task", "poetry"],
            "task must be one of exact, .*got 'poetry'",
        ),
        (["--predictions", "p", "--dataset", "shapes-and-digits", "--metric", "bleu"], "metric must be one of .*got 'bleu'"),
        (["--predictions", "/nowhere", "--dataset", "shapes-and-digits"], "predictions must be an existing file, got /nowhere"),
        (["--predictions", "p", "--dataset", "shapes-and-digits", "--log", "/nowhere"], "--log: .*No such file.*/nowhere"),
    ],
)
def test_user_errors(flags, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["eval", *flags])
    assert exit.value.code == 2
    assert re.search(f"vlmkernels eval: error: .*{message}", " ".join(capsys.readouterr().err.split()))


def test_every_harness_and_task_has_metrics():
    for name, harness in HARNESSES.items():
        for task in TASKS:
            for metric in harness.task_metrics(task):
                assert harness.metric(metric).doc, (name, task)
