"""Tasks, and the differences of other harnesses; lmms-eval against its own functions."""

import numpy as np
import pytest
from support import harnesses
from support.evaluations import given, values

from vlmkernels.evaluate.evaluation import Evaluation, Scoring
from vlmkernels.evaluate.tasks import HARNESSES, TASKS
from vlmkernels.evaluate.vqa import vqa_accuracy

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
    spread = "a   b   c   d"  # the distance is that of "a b c d", the length in lmms-eval that of this
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


def test_every_harness_and_task_has_metrics():
    for name, harness in HARNESSES.items():
        for task in TASKS:
            for metric in harness.task_metrics(task):
                assert harness.metric(metric).doc, (name, task)
