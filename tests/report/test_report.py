"""The page of a run: a complete, a running, a killed and a resumed run, and folders that are not runs."""

import html.parser
import math
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.recorded_runs import complete_run

from vlmkernels import cli
from vlmkernels.record.callback import json_line
from vlmkernels.record.completions import CompletionRow, save_step
from vlmkernels.record.metrics import PHASES
from vlmkernels.record.reading import read_lines
from vlmkernels.record.turns import turn_rows
from vlmkernels.report.curves import MAX_POINTS, Point, curve, thin

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a <run>"
    return complete_run(folder), folder


class Parser(html.parser.HTMLParser):
    """Check that elements are closed in order, and collect the URLs that a browser would load."""

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "img", "input", "path", "circle", "polyline", "polygon", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def page(folder, capsys) -> tuple[str, Parser]:
    assert cli.main(["report", str(folder)]) == 0
    output = Path(capsys.readouterr().out.strip())
    assert output == folder / "report.html"
    parser = Parser()
    parser.feed(output.read_text())
    assert parser.open == []
    assert all(value.startswith("data:image/") for value in parser.loads)
    assert not re.search(r"url\((?!&#x27;data:image/)", output.read_text())
    return output.read_text(), parser


def test_page_of_a_run(run, capsys):
    text, parser = page(run[1], capsys)
    assert "<h1>a &lt;run&gt;</h1>" in text
    assert "step 4 of 4, finished" in text
    for heading in ("Rewards", "Evaluation", "Time ", "Tokens and images per step", "Completions", "Policy", "Samples"):
        assert f"<h2>{heading}" in text
    assert "Other</h2>" not in text
    assert parser.tags.count("img") == text.count("data:image/png;base64,") > 0
    assert [name for name in PHASES if f"<td>{name}</td>" in text] == [
        name for name in PHASES if name not in ("old_logps", "image_use", "teacher")
    ]
    assert all(f'value="{step}"' in text for step in (1, 2, 3, 4))
    assert "learning_rate" in text
    assert "<h2>Data and rewards</h2>" in text
    assert re.search(r"<td>dataset</td><td>[^<]*rows \d+, columns \[", text)
    assert re.search(r"<td>reward \w+</td><td>function [^<]*, weight 1.0", text)
    assert "<small>answer: " in text  # the references of the shown prompts
    assert torch.__version__.split("+")[0] in text


def test_page_of_a_run_that_goes_on(run, tmp_path, capsys):
    """With a half-written last line, with a checkpoint alone, and before the first log."""
    text = (run[1] / "metrics.jsonl").read_text()
    upto = text.index('"step": 3}')
    (tmp_path / "metrics.jsonl").write_text(text[: upto - 20])
    shown, _ = page(tmp_path, capsys)
    assert "step 2, not finished; last logged" in shown
    assert "there is no run.json" in shown

    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text((run[1] / "checkpoint-2" / "trainer_state.json").read_text())
    shown, _ = page(tmp_path, capsys)
    assert "step 2, not finished" in shown
    assert "from trainer_state.json" in shown

    (tmp_path / "metrics.jsonl").touch()
    assert "Nothing has been logged yet" in page(tmp_path, capsys)[0]


def test_page_of_a_run_with_tools(tmp_path, capsys):
    """It has the curves of tools, and all turns of trajectories, whose images it holds once per prompt."""
    names = ("tools/call_frequency", "tools/zoom/calls", "tools/zoom/failures")
    entries = [{"step": step, "loss": 1.0, **dict.fromkeys(names, step / 2)} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(map(json_line, entries)))
    call = {"type": "function", "function": {"name": "zoom", "arguments": {"x": 3}}}
    parts = [{"type": "text", "text": "a crop"}, {"type": "image", "image": Image.new("RGB", (8, 4), "red")}]
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "name": "zoom", "content": parts}]
    rows = [
        CompletionRow(
            "what?", [], text, {"cer": 0.5}, 0.5, turns=turn_rows([*messages, {"role": "assistant", "content": text}])
        )
        for text in ("red", "blue")
    ]
    for step in (1, 2):
        save_step(tmp_path / "completions", step, [rows])
    text, _ = page(tmp_path, capsys)
    section = text.split("<h2>Tools</h2>")[1].split("<h2>")[0]
    shown, more = section.split("<summary>1 more</summary>")
    assert [name in shown for name in names] == [True, True, False]
    assert "share of the calls of one tool that failed" in more
    assert "Other</h2>" not in text
    assert text.count("2 turns · 1 call · 0 failures") == 4
    assert text.count("<b>zoom</b> {&quot;x&quot;: 3}") == text.count("<pre>a crop</pre>") == 4
    assert (text.count("data:image/"), text.count("background-image: var(--shot-0)")) == (2, 4)


def test_page_warns_of_values_that_are_not_finite(tmp_path, capsys):
    entries = [{"step": s, "loss": 1.0 / s if s < 5 else math.nan, "reward": 1.0, "new": s} for s in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(map(json_line, entries)))
    text, _ = page(tmp_path, capsys)
    assert "loss has been nan since step 5" in text
    assert "Constant: reward 1" in text
    assert "<h2>Other</h2>" in text


def test_output_must_not_be_a_folder(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["report", str(tmp_path), "--output", str(tmp_path)])
    assert stopped.value.code == 2
    assert f"--output must be a file, got the folder {tmp_path}" in capsys.readouterr().err
    assert not list(tmp_path.parent.glob(".*.part"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "RUN must be an existing folder, got "),
        ({}, "RUN must be the output_dir of a training run and contain metrics.jsonl, .* which is empty"),
        ({"latest_checkpointed_iteration.txt": "10"}, r"RUN must be .* which contains latest_checkpointed_iteration.txt"),
        ({"metrics.jsonl": '{"step": 1}\nloss=3\n{"step": 2}\n'}, "line 2 of .* must be JSON, got 'loss=3'"),
        ({"metrics.jsonl": '{"loss": 1}\n'}, 'line 1 of .* must be an object with an integer step, got {"loss": 1}'),
        ({"metrics.jsonl": "[1]\n"}, r"must be an object with an integer step, got \[1\]"),
        ({"trainer_state.json": "{}"}, "log must be a JSON file with log_history, such as trainer_state.json, got "),
        ({"trainer_state.json": '{"log_history": {}}'}, "log_history must be a list, got dict"),
        ({"metrics.jsonl": "", "run.json": "[]"}, "run.json must be an object, got list"),
        ({"metrics.jsonl": "", "run.json": "{"}, "run.json must be JSON, got "),
    ],
)
def test_folders_that_are_not_runs(tmp_path, capsys, files, message):
    folder = tmp_path / "run"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["report", str(folder)])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (folder / "report.html").exists()


def test_read_lines_ignores_an_incomplete_last_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": "NaN"}\n{"step": 2, "text": "\xc3')
    (entry,) = read_lines(tmp_path / "metrics.jsonl")
    assert math.isnan(entry["loss"])


def test_curves_of_many_points_are_thinned():
    points = [Point(step, step % 7) for step in range(10_000)]
    few = thin(points)
    assert len(few) <= MAX_POINTS
    assert few[-1].step == 9_999
    assert all(p.low <= p.value <= p.high for p in few)
    assert min(p.low for p in few) == 0
    assert max(p.high for p in few) == 6
    assert len(curve("x", points)) < 40_000
    assert curve("x", [Point(1, 2.0), Point(2, 2.0)]) == curve("x", []) == curve("x", [Point(1, math.nan)]) == ""
