"""Each harness of ``--match`` scores 10,000 random answers per task as we do.

The scores of lmms-eval come from its own functions. Those of VLMEvalKit come from formulas in ``tests/support/vlmevalkit.py``.
"""

import copy
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from support import harnesses, vlmevalkit
from support.answers import Answers
from support.evaluations import given, values

from vlmkernels.evaluate.evaluation import Evaluation, Scoring
from vlmkernels.evaluate.tasks import HARNESSES

DOCS = Path(__file__).parents[2] / "docs" / "evaluation.md"
COUNT = 10_000
DRAWS = {
    "exact": Answers.accepted,
    "choice": Answers.choice,
    "yes_no": Answers.yes_no,
    "mme": Answers.yes_no,
    "counting": Answers.count,
    "chart": Answers.accepted,
    "docvqa": Answers.accepted,
    "vqa": Answers.people,
}
SCORE = {"chart": "relaxed_accuracy", "docvqa": "anls", "vqa": "vqa_accuracy"}
needs_lmms_eval = pytest.mark.skipif(not harnesses.INSTALLED, reason=f"lmms-eval is not in {harnesses.LMMS_EVAL.parent}")


@cache
def drawn(task: str) -> tuple[list[str], list[dict]]:
    """Answers and the rows of the dataset."""
    draws = Answers(seed=sorted(DRAWS).index(task))
    answers, rows = [], []
    for index in range(COUNT):
        answer, reference, *options = DRAWS[task](draws)
        answers.append(answer)
        row = {"prompt": "?", "task": task, "answer": reference, **(options[0] if options else {})}
        rows.append({**row, "question_id": f"q{index // 2}", "category": ("count", "OCR")[index // 2 % 2]})
    return answers, rows


def ours(tmp_path, task: str, match: str, rows: list[dict], answers: list[str]) -> tuple[np.ndarray, dict[str, float]]:
    """The score of each answer, and every metric."""
    found = Evaluation(given(tmp_path / "p.jsonl", answers), rows, Scoring(match=match, by="task", replicates=1))
    group = found.groups[task]
    scores = group.statistic(SCORE[task]).statistics[:, 0, 0] if task in SCORE else group.answers["image"].correct[:, 0]
    return scores, {result.metric: result.estimate.value for result in found.results}


def lmms_eval(task: str, answer: str, row: dict) -> float | dict:
    """What lmms-eval computes for an answer: a score, or (POPE and MME) the value that its aggregation takes."""
    reference, run = row["answer"], harnesses.results_of
    doc = {**row, "number": reference, "index": 0, "category": row["category"], "l2_category": "", "type": "human_test"}
    if task == "exact":
        options = {"function": "exact_match_hf_evaluate", "ignore_case": True, "ignore_punctuation": True}
        return float(run(None, answer, {"target": reference}, exact_match=options)["exact_match"])
    if task == "docvqa":
        return float(run(None, answer, {"target": reference}, anls={"function": "anls"})["anls"])
    if task == "chart":  # one reference
        chart = harnesses.load("tasks/chartqa/utils.py").chartqa_process_results
        return max(run(chart, answer, {**doc, "answer": one})["relaxed_overall"] for one in reference)
    if task == "vqa":
        doc = {"question_id": 0, "answers": [{"answer": one, "answer_id": i} for i, one in enumerate(reference)]}
        return run(harnesses.load("tasks/vqav2/utils.py").vqav2_process_results, answer, doc)["exact_match"]
    path, name = {
        "choice": ("tasks/mmstar/utils.py", "average"),
        "yes_no": ("tasks/pope/utils.py", "pope_accuracy"),
        "mme": ("tasks/mme/utils.py", "mme_perception_score"),
        "counting": ("tasks/countbench/utils.py", "acc"),
    }[task]
    process = getattr(harnesses.load(path), f"{path.split('/')[1]}_process_results")
    return run(process, answer, doc)[name]


@needs_lmms_eval
@pytest.mark.parametrize("task", DRAWS)
def test_lmms_eval(task, tmp_path, monkeypatch):
    answers, rows = drawn(task)
    extract = harnesses.load("tasks/_task_utils/mcq_extract.py")
    monkeypatch.setitem(sys.modules, "lmms_eval.tasks._task_utils.mcq_extract", extract)  # mmstar imports it when it is called
    theirs = [lmms_eval(task, answer, copy.copy(row)) for answer, row in zip(answers, rows, strict=True)]
    scores, metrics = ours(tmp_path, task, "lmms-eval", rows, answers)
    expected = np.array([value["score"] if isinstance(value, dict) else value for value in theirs])
    differ = np.abs(scores - expected) > 1e-12
    assert differ.sum() == 0, [(answers[i], rows[i]["answer"], scores[i], expected[i]) for i in np.flatnonzero(differ)[:5]]
    assert 0.05 < expected.mean() < 0.9
    if task == "yes_no":
        pope = harnesses.load("tasks/pope/utils.py")
        for metric, name in {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "f1_score"}.items():
            assert metrics[metric] == pytest.approx(getattr(pope, f"pope_aggregate_{name}")(theirs), abs=1e-12), metric
        assert metrics["yes_ratio"] == pytest.approx(pope.pope_aggregate_yes_ratio(theirs), abs=1e-12)
    if task == "mme":
        aggregate = harnesses.load("tasks/mme/utils.py").mme_aggregate_results
        assert metrics["mme_score"] == pytest.approx(aggregate(theirs), abs=1e-9)


def vlmevalkit_score(task: str, answer: str, row: dict) -> float:
    reference = row["answer"]
    if task == "choice":
        options = {letter: row[letter] for letter in "ABCDE" if letter in row}
        return float(vlmevalkit.can_infer(answer, options) == reference)
    if task in ("yes_no", "mme"):
        return float(vlmevalkit.yes_or_no(answer) == reference.capitalize())
    functions = {
        "exact": "accuracy",
        "counting": "count_bench",
        "chart": "relaxed_accuracy",
        "docvqa": "anls",
        "vqa": "vqa_score",
    }
    return getattr(vlmevalkit, functions[task])(answer, reference)


@needs_lmms_eval
@pytest.mark.parametrize("task", DRAWS)
def test_vlmevalkit(task, tmp_path):
    answers, rows = drawn(task)
    expected = np.array([vlmevalkit_score(task, answer, row) for answer, row in zip(answers, rows, strict=True)])
    scores, metrics = ours(tmp_path, task, "vlmevalkit", rows, answers)
    differ = np.abs(scores - expected) > 1e-12
    assert differ.sum() == 0, [(answers[i], rows[i]["answer"], scores[i], expected[i]) for i in np.flatnonzero(differ)[:5]]
    assert 0.05 < expected.mean() < 0.9
    if task == "yes_no":
        pope = vlmevalkit.pope(answers, [row["answer"] for row in rows])
        assert {name: metrics[name] for name in pope} == pytest.approx(pope, abs=1e-12)
        assert "yes_ratio" not in metrics
    if task == "mme":
        columns = [row["category"] for row in rows], [row["question_id"] for row in rows]
        assert metrics["mme_score"] == pytest.approx(vlmevalkit.mme(list(expected == 1), *columns), abs=1e-9)


def examples() -> list[tuple[str, ...]]:
    """The rows of the table in docs/evaluation.md."""
    rows = DOCS.read_text().split("<!-- examples -->")[1].split("<!-- end -->")[0].strip().splitlines()[2:]
    return [tuple(cell.strip().strip("`") for cell in row.strip("|").split("|")) for row in rows]


@pytest.mark.parametrize(("task", "reference", "answer", "scores"), [(*row[:3], row[3:]) for row in examples()])
def test_differences_in_the_documentation(task, reference, answer, scores, tmp_path):
    columns = {"A": "dog", "B": "a cat and a bird", "question_id": 0}
    rows = [{"prompt": "?", "task": task, "answer": [reference] * 4 if task == "vqa" else reference, **columns}]
    rows *= 2 if task == "mme" else 1
    for match, score in zip(("vlmkernels", "lmms-eval", "vlmevalkit"), scores, strict=True):
        got = ours(tmp_path, task, match, rows, [answer] * len(rows))[0][0]
        assert f"{got:.2g}" == score, match


def test_every_rule_of_a_text_task_is_compared():
    for match in ("lmms-eval", "vlmevalkit"):
        assert set(HARNESSES[match].rules) >= set(DRAWS)


@pytest.mark.parametrize("match", ["lmms-eval", "vlmevalkit"])
def test_no_yes_at_all(match, tmp_path):
    """Both harnesses report 0 for 0 / 0."""
    got = values(tmp_path, "yes_no", ["yes", "no"], ["no", "no"], match=match)
    assert (got["precision"], got["recall"], got["f1"]) == (0, 0, 0)
