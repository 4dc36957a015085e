"""Evaluation of a dataset: the effect of the image, invalid datasets, the command line and its page."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from support import tiny
from support.evaluations import given

from vlmkernels.cli import main
from vlmkernels.evaluate.evaluation import Evaluation, Scoring
from vlmkernels.evaluate.predictions import Predictions
from vlmkernels.evaluate.report import to_markdown, to_text

torch.set_num_threads(1)


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


@pytest.mark.parametrize(
    ("rows", "scoring", "message"),
    [
        (
            [{"task": "grounding", "answer": [0, 0, 1, 1]}, {"task": "grounding", "answer": "left"}],
            {},
            "sample 1: answer must be ",
        ),
        ([{"task": "grounding", "answer": [3, 0, 1, 1]}], {}, r"sample 0: answer must have finite boxes with x1 < x2"),
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
        (
            [{"answer": "a"}],
            {"metrics": ("mean_length",)},
            "metric mean_length needs completions with the field 'length', got none",
        ),
        ([{"answer": "a"}], {"metrics": ("mean_tool_calls",)}, "mean_tool_calls needs completions with the field 'tool_calls'"),
        ([{"answer": "a"}], {"metrics": ("rewards/cer",)}, "rewards/cer needs a reward of this name, got no rewards"),
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
    """A datasets.Dataset with images gives the results of a list of rows, and the command line reads its saved folder."""
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


# The command line and the page


class Structure(HTMLParser):
    """Collects unclosed elements and external resources of a page."""

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
    """Predictions of the first 60 samples of shapes-and-digits, 90 % and 50 % of them correct."""
    from vlmkernels.evaluate.shapes_and_digits import ShapesAndDigits

    folder, rows = tmp_path_factory.mktemp("suite"), ShapesAndDigits("test", 60)
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
    printed = capsys.readouterr().out  # every metric of every group, also without a terminal
    assert re.search(r"^all +accuracy +90\.0 % +\d", printed, flags=re.MULTILINE)
    rows = {tuple(line.split()[:2]) for line in printed.splitlines()}
    assert rows >= {(group, metric) for group, metrics in result["metrics"].items() for metric in metrics}
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
    names = [f"{tmp_path.name}/checkpoint-{step}" for step in (10, 20)]
    assert [(entry["name"], entry["step"]) for entry in result["models"]] == [(names[0], 10), (names[1], 20)]
    (comparison,) = result["comparisons"]
    assert (comparison["model"], comparison["baseline"]) == (names[1], names[0])
    assert comparison["difference"]["exact"]["accuracy"].keys() >= {"value", "low", "high", "p_value"}
    for suffix in (".md", ".html"):
        assert f"{names[1]} compared with {names[0]}" in output.with_suffix(suffix).read_text()
    assert {"hidden", "cost"} < set(result["metrics"]["exact"]["accuracy"])
    assert 0 <= result["metrics"]["exact"]["rewards/cer"]["value"] <= 1
    assert structure(output.with_suffix(".html")).count["polyline"] >= 1
    files = sorted(tmp_path.glob("eval-*.jsonl"))
    plain = [name.replace("/", "-") for name in names]  # one of each model, with its name
    assert [file.name.rpartition("-")[0] for file in files] == [f"eval-{name}" for name in plain]
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
        (
            ["--predictions", "p", "--dataset", "shapes-and-digits", "--output", "a.html"],
            "--output must be the JSON file.*a.html",
        ),
        *(
            ([flag, "a/b", flag, "./a/b/", "--dataset", "x"], f"{flag} must be a different path each time, got a/b again")
            for flag in ("--model", "--predictions")
        ),
        (["--predictions", "p", "--dataset", "x", "--output", "folder/"], "--output must be the JSON file.*folder/"),
        (["--predictions", "p", "--dataset", "x", "--output", "/dev/null/a.json"], "--output: .*/dev/null"),
        (["--predictions", "p", "--dataset", "x", "--samples", "-1"], "--samples must be >= 0, got -1"),
        (
            ["--dataset", "x", "--max_new_tokens", "2"],
            "unrecognized arguments: --max_new_tokens 2: use --max_completion_length",
        ),
        (["--model", "a"], "--dataset must be given"),
        (
            ["--model", "a", "--dataset", "shapes-and-digits", "--baseline", "/nowhere"],
            "--baseline: predictions must be an exist",
        ),
        (["--predictions", "p", "--datset", "x"], "unrecognized arguments: --datset x .did you mean --dataset"),
        (
            ["--dataset", "x", "--num-completions", "2"],
            "unrecognized arguments: --num-completions 2 .did you mean --num.generations",
        ),
        (["--dataset", "shapes-and-digits"], "exactly one of --model and --predictions must be given"),
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


def test_groups_of_any_name(tmp_path):
    """A group named like the group of all samples keeps its own metrics, and tables keep their rows and columns."""
    kinds = ["all", "a|b", "two\nlines", "x" * 300]
    rows = [{"prompt": "?", "answer": str(i), "kind": kind} for i, kind in enumerate(kinds)]
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps({"index": i, "completion": "0"}) + "\n" for i in range(4)))
    evaluation = Evaluation(Predictions.read(path), rows, Scoring(by="kind", replicates=10))
    assert list(evaluation.groups) == ["all", "all (exact)", *kinds[1:]]
    assert [evaluation.value(name, "accuracy") for name in evaluation.groups] == [0.25, 1, 0, 0, 0]
    table = to_markdown(evaluation).splitlines()
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {5}
    text = to_text({"model": evaluation}).splitlines()
    assert len(text) == 1 + len(evaluation.results)
    assert max(map(len, text)) < 128
