"""Tasks, and the differences of other harnesses; boxes of lmms-eval against its own functions."""

import numpy as np
import pytest
from support import harnesses
from support.evaluations import given, values

from vlmkernels.evaluate.evaluation import Evaluation, Scoring
from vlmkernels.evaluate.tasks import HARNESSES, TASKS

RNG = np.random.default_rng(0)


def test_differences_of_harnesses(tmp_path):
    """What counts as an answer, and which answers are ignored."""
    references, answers = ["yes", "yes", "no", "no"], ["yes", "yes, it is", "no", "who knows"]
    ours = values(tmp_path, "yes_no", references, answers)
    lmms = values(tmp_path, "yes_no", references, answers, match="lmms-eval")
    assert (ours["accuracy"], ours["recall"], ours["yes_ratio"]) == (0.75, 1.0, 0.5)
    assert (lmms["accuracy"], lmms["recall"], lmms["yes_ratio"]) == (0.5, 1.0, 0.5)
    skewed = ["yes", "yes", "yes", "no"]
    lmms = values(tmp_path, "yes_no", skewed, ["no", "what", "yes", "no"], match="lmms-eval")
    # lmms-eval ignores unparsed answers, and its yes-ratio is that of the references.
    assert (lmms["recall"], lmms["yes_ratio"]) == (0.5, 0.75)
    ours = values(tmp_path, "yes_no", skewed, ["no", "what", "yes", "no"])
    assert (ours["recall"], ours["yes_ratio"]) == pytest.approx((1 / 3, 0.25))

    assert (
        values(tmp_path, "mme", ["yes", "no"], ["Yes!", "N"], match="lmms-eval", columns={"question_id": 1})["mme_accuracy"]
        == 1
    )
    zero = values(tmp_path, "chart", ["0", "1,000"], ["0.0", "1000"])
    assert zero["relaxed_accuracy"] == 1
    for harness in ("lmms-eval", "vlmevalkit"):  # values that float rejects, and a reference of 0, are compared as text
        assert values(tmp_path, "chart", ["0", "1,000"], ["0.0", "1000"], match=harness)["relaxed_accuracy"] == 0
    spread = "a   b   c   d"  # the distance is that of "a b c d", the length that of this
    for harness in ("lmms-eval", "vlmevalkit"):
        assert values(tmp_path, "docvqa", ["a b c x"], [spread], match=harness)["anls"] == pytest.approx(1 - 1 / 13)


needs_lmms_eval = pytest.mark.skipif(not harnesses.INSTALLED, reason=f"lmms-eval is not in {harnesses.LMMS_EVAL.parent}")


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


OPTIONS = {"A": "a red car", "B": "two dogs"}


def test_options_of_vlmevalkit(tmp_path):
    """A letter among the last words, or the text of one option; a refusal is no answer."""
    answers = [
        "B",
        "The answer is **B**, because A is red and B is not.",
        "They are two dogs.",
        "Cannot determine the answer: two dogs",
    ]
    got = values(tmp_path, "choice", ["B"] * 4, answers, columns=OPTIONS, match="vlmevalkit")
    assert (got["accuracy"], got["parse_failure_rate"]) == (0.75, 0.25)


def test_a_reference_that_is_a_literal_list_for_vlmevalkit(tmp_path):
    references = ["['12', 'twelve']", "[]", "[1, 2", [12, "x"]]
    answers = ["twelve", "[]", "[1, 2", "12"]
    assert values(tmp_path, "docvqa", references, answers, match="vlmevalkit")["anls"] == 1
    assert values(tmp_path, "docvqa", references[:1], answers[:1])["anls"] == 0


def test_grades_are_those_of_the_harness(tmp_path):
    """Metrics of several completions count the answers that the harness counts."""
    rounded = [["104", "106"], ["1,000", "1000"]]
    got = values(
        tmp_path, "chart", ["100", "1000"], rounded, match="lmms-eval", metrics=("relaxed_accuracy", "accuracy", "pass@2")
    )
    assert (got["relaxed_accuracy"], got["accuracy"], got["pass@2"]) == (0.5, 0.5, 1)


@pytest.mark.parametrize(
    ("task", "row", "options", "message"),
    [
        (
            "ocr",
            {},
            {"match": "lmms-eval"},
            "sample 0: with match 'lmms-eval', task must be one of exact, choice, .*, got 'ocr'",
        ),
        ("yes_no", {}, {"match": "vlm-r1"}, "sample 0: with match 'vlm-r1', task must be one of grounding.*, got 'yes_no'"),
        (
            "choice",
            {"A": "x", "B": ""},
            {"match": "vlmevalkit"},
            "must have the texts of the options in columns 'A', 'B', ..., got ",
        ),
        ("choice", {"answer": "(E)"}, {"match": "lmms-eval"}, r"answer must be one of A, B, C, D, got '\(E\)'"),
        (
            "counting",
            {},
            {"match": "lmms-eval", "metrics": ("soft_count",)},
            "metric must be one of this harness .*'soft_count'",
        ),
    ],
)
def test_what_a_harness_does_not_compare(task, row, options, message, tmp_path):
    rows, predictions = [{"prompt": "?", "task": task, "answer": "A", **row}], given(tmp_path / "p.jsonl", ["A"])
    with pytest.raises(ValueError, match=message):
        Evaluation(predictions, rows, Scoring(**options))


def test_rewards_of_open_tasks_match_any_harness(tmp_path):
    for match in HARNESSES:
        assert "parse_failure_rate" in values(tmp_path, "open", [None], ["anything"], match=match)


def test_every_harness_and_task_has_metrics():
    for name, harness in HARNESSES.items():
        for task in harness.rules or TASKS:
            for metric in harness.task_metrics(task):
                assert harness.metric(metric).doc, (name, task)
