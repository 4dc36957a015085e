"""Folders of runs: of this package and of TRL, running, killed, truncated and foreign ones, the command, and the page."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.histories import group, history, ramp, stored

from vlmkernels import cli
from vlmkernels.doctor import diagnose, read_run, unchecked
from vlmkernels.record.callback import json_line


def write_run(folder, num=30, **changes):
    """Write metrics.jsonl and run.json of a run, healthy unless changed, and completions of every third step."""
    folder.mkdir(exist_ok=True)
    run = history(num, **changes)
    (folder / "metrics.jsonl").write_text("".join(map(json_line, run.steps)))
    (folder / "run.json").write_text(json.dumps({"max_steps": 30, "arguments": {"logging_steps": 1}}))
    (folder / "completions").mkdir(exist_ok=True)
    for step, groups in stored(
        lambda step, index: group([f"{step}{index}", "b"], [1.0, 0.0], f"user: {step}{index}", "AAAA")
    ).items():
        content = json.dumps({"step": 3 * step, "groups": groups})
        (folder / "completions" / f"step-{3 * step:06d}.json").write_text(content)
    return folder


def add_checkpoint(folder, step, entries=()):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": list(entries)}))
    return path


def message(text, role="assistant"):
    return [{"role": role, "content": text}]


def question(text):
    return [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": text}]}]


def trl_rows(step, answers, size=4, log=False):
    """Rows of TRL's table of a step: groups of ``size`` completions whose prompts differ only in their images."""
    rows = []
    for start in range(0, len(answers), size):
        part, extra = answers[start : start + size], {"solution": f"{start}"} if log else {}
        scores = [float(text == f"{start}") for text in part]
        mean = sum(scores) / len(scores)
        for text, score in zip(part, scores, strict=True):
            row = {
                "step": step,
                "prompt": question("which number?"),
                "completion": message(text),
                "accuracy": score,
                "style": None,
            }
            rows.append({**row, **extra, "advantage": score - mean})
    return rows


def write_trl(folder, tables, steps=30, **changes):
    folder.mkdir(exist_ok=True)
    entries = history(steps, **{"rewards/style/mean": lambda step: None, **changes}).steps
    add_checkpoint(folder, steps // 2, entries[: steps // 2])
    add_checkpoint(folder, steps, entries)
    (folder / "completions").mkdir()
    for step, rows in tables.items():
        pq.write_table(pa.Table.from_pylist(rows), folder / "completions" / f"completions_{step:05d}.parquet")
    return folder


def doctor(capsys, *argv):
    code = cli.main(["doctor", *map(str, argv)])
    return code, capsys.readouterr().out


def fails(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", *map(str, argv)])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_a_healthy_run(tmp_path, capsys):
    add_checkpoint(write_run(tmp_path / "run"), 20)
    code, out = doctor(capsys, tmp_path / "run")
    assert code == 0
    assert f"{tmp_path / 'run'}: step 30, 30 logs, completions of 12 steps, 1 checkpoint" in out
    assert "No problem; 28 of 28 rules checked." in out


def test_a_broken_run(tmp_path, capsys):
    folder = write_run(tmp_path / "run", reward=lambda step: 0.9 if step < 20 else 0.1, **{"completions/clipped_ratio": 0.6})
    for step in (5, 10, 25):
        add_checkpoint(folder, step)
    code, out = doctor(capsys, folder)
    assert code == 1
    assert "PROBLEM  truncation, since step 10\n    6" in out
    assert re.search(
        r"PROBLEM  reward-collapse, since step 22\n    The reward fell from 0\.9\d* to 0\.1\d*\.\n    example: step 24, ", out
    )
    assert "-> 'b' (accuracy 0)" in out
    assert "the last checkpoint before is checkpoint-10." in out
    assert "remedy: Resume from a checkpoint before the collapse with a lower learning_rate" in out
    assert "2 problems, 1 note; 28 of 28 rules checked." in out
    assert out.index("truncation") < out.index("reward-collapse") < out.index("NOTE  checkpoint-before-collapse")


def test_json(tmp_path, capsys):
    code, out = doctor(capsys, write_run(tmp_path / "run", kl=None, **{"completions/clipped_ratio": 0.6}), "--json")
    content = json.loads(out)
    assert code == 1
    assert (content["step"], content["healthy"], content["notes"]) == (30, False, [])
    assert content["not_checked"] == {"kl-runaway": "kl is not logged"}
    (finding,) = content["findings"]
    assert (finding["rule"], finding["step"], finding["metric"]) == ("truncation", 10, "completions/clipped_ratio")
    assert finding["value"] == pytest.approx(0.6, abs=0.03)
    assert set(finding["example"]) == {"step", "prompt", "completion", "rewards", "references"}


def test_notes_do_not_change_the_exit_code(tmp_path, capsys):
    code, out = doctor(capsys, write_run(tmp_path / "run", epoch=ramp(0.0, 90.0)))
    assert code == 0
    assert "NOTE  data-repeated" in out
    assert "No problem, 1 note; " in out


def test_folders_that_are_not_runs(tmp_path, capsys):
    assert "RUN must be an existing folder" in fails(capsys, tmp_path / "missing")
    assert "contain metrics.jsonl, trainer_state.json or a checkpoint, got" in fails(capsys, tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert "which contains model.safetensors" in fails(capsys, tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1}\n')  # of another program
    assert "line 1 of" in fails(capsys, tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "trainer_state.json").write_text('{"log_history": ')
    assert "log must be a JSON file with log_history" in fails(capsys, tmp_path)


def test_a_run_without_logs_cannot_be_judged(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("")
    code, out = doctor(capsys, folder)
    assert code == 2
    assert "(no step of training is logged; see logging_steps)" in out
    (folder / "metrics.jsonl").write_text('{"step": 30, "train_runtime": 3.0}\n')
    (folder / "run.json").write_text('{"arguments": {"logging_steps": 100}}')
    code, out = doctor(capsys, folder)
    assert code == 2
    assert "(no step of training is logged; logging_steps=100)" in out
    assert "No problem; 0 of 28 rules checked. Not checked:" in out


def test_a_run_that_is_being_written(tmp_path):
    folder = write_run(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(lines[:-20])
    run = read_run(folder)
    assert len(run.steps) == 29
    assert run.notes == ["the last line of metrics.jsonl is not complete and was ignored"]
    assert diagnose(run) == []


def test_a_last_line_without_a_line_break_is_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.1}\n{"step": 2, "loss": 0.1}')
    run = read_run(tmp_path)
    assert [entry["step"] for entry in run.steps] == [1, 2]
    assert run.notes == []


def test_truncated_files_become_notes(tmp_path):
    folder = write_run(tmp_path / "run")
    for name in ("run.json", "completions/step-000012.json"):
        (folder / name).write_text((folder / name).read_text()[:30])
    run = read_run(folder)
    assert (len(run.completions), run.arguments) == (11, {})
    assert [note.split()[0] for note in run.notes] == ["run.json", "step-000012.json"]


def test_an_older_checkpoint_is_read_if_the_newest_is_truncated(tmp_path):
    folder = write_trl(tmp_path / "run", {})
    (folder / "checkpoint-30" / "trainer_state.json").write_text('{"log_history": [{"st')
    run = read_run(folder)
    assert run.steps[-1]["step"] == 15
    assert run.notes[0].endswith("an older log is read instead")


def test_a_resumed_run(tmp_path):
    folder = write_run(tmp_path / "run")
    write_run(folder / "previous", 3)  # not a start
    for number in (1, 2):
        write_run(folder / "previous" / str(number))
    run = read_run(folder)
    assert len(run.steps) == 30
    assert "2 earlier starts in previous/ are not judged" in run.notes
    assert len(read_run(folder / "previous" / "2").steps) == 30


def test_a_checkpoint_of_a_run(tmp_path):
    folder = write_trl(tmp_path / "run", {})
    run = read_run(folder / "checkpoint-15")
    assert run.steps[-1]["step"] == 15
    assert run.notes == ["RUN is a checkpoint: later steps and the completions are in the folder that holds it"]


def test_a_run_of_trl(tmp_path, capsys):
    rows = {step: trl_rows(step, ["7", "7", "7", "0"] * 4, log=True) for step in range(1, 5)}
    folder = write_trl(tmp_path / "run", rows, **{"rewards/accuracy/unparsed": None})
    run = read_run(folder)
    assert (run.steps[-1]["step"], run.checkpoints, run.notes) == (30, [15, 30], [])
    first, *others = run.completions[1]
    assert len(others) == 3  # groups of 4, although the prompts of all are equal
    assert first["prompt"] == "user: [image]which number?"
    assert (first["images"], first["images_missing"], first["references"]) == ([], True, {"solution": "0"})
    assert first["completions"][3] == {"text": "0", "rewards": {"accuracy": 1.0, "style": None}, "advantage": 0.75}
    assert doctor(capsys, folder)[0] == 0
    assert "unparsed-as-zero" not in unchecked(run)


def test_one_answer_in_a_run_of_trl(tmp_path):
    """The answer 0 is right for the first of 8 images only. Step 5, where no completion has an advantage, has groups too."""
    tables = {step: trl_rows(step, [str(step)] * 3 + ["0"] * 29) for step in range(1, 5)}
    folder = write_trl(tmp_path / "run", tables | {5: trl_rows(5, ["0"] * 32)})
    assert len(read_run(folder).completions[5]) == 8
    assert [finding.rule for finding in diagnose(read_run(folder))] == ["one-answer"]


def test_text_prompts_and_trajectories_of_trl(tmp_path):
    calls = [{"role": "assistant", "content": "", "tool_calls": []}, *message("5", "tool"), *message("it is 5")]
    rows = [
        {"step": 1, "prompt": prompt, "completion": completion, "accuracy": 0.0, "advantage": 0.0}
        for prompt, completion in (("a", "x"), ("a", "y"), ("b", "z"))
    ]
    folder = write_trl(tmp_path / "run", {1: rows})
    groups = read_run(folder).completions[1]
    assert [(g["prompt"], [row["text"] for row in g["completions"]]) for g in groups] == [("a", ["x", "y"]), ("b", ["z"])]
    assert "images_missing" not in groups[0]
    rows = [{"step": 2, "prompt": message("a", "user"), "completion": calls, "accuracy": 0.0, "advantage": 0.0}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "completions" / "completions_00002.parquet")
    assert read_run(folder).completions[2][0]["completions"][0]["text"] == "it is 5"


def test_tables_that_cannot_be_read_become_notes(tmp_path, monkeypatch):
    folder = write_trl(tmp_path / "run", {1: trl_rows(1, ["0"] * 4), 2: [{"step": 2, "text": "a"}]})
    (folder / "completions" / "completions_00003.parquet").write_bytes(b"PAR1 cut off")
    run = read_run(folder)
    assert list(run.completions) == [1]
    assert run.notes[0] == (
        "completions_00002.parquet must have the columns step, prompt, completion, advantage,"
        " got none named prompt, completion, advantage"
    )
    assert len(run.notes) == 2
    monkeypatch.setattr("vlmkernels.doctor.reading.find_spec", lambda name: None)
    run = read_run(folder)
    assert (run.completions, run.notes) == ({}, ["3 tables of completions are not read, because pyarrow is not installed"])


def test_page(tmp_path, capsys):
    folder = write_run(tmp_path / "run", kl=None, **{"completions/clipped_ratio": ramp(0.3, 0.9)})
    assert cli.main(["report", str(folder)]) == 0
    text = (folder / "report.html").read_text()
    section = text[text.index("<h2>Doctor") : text.index("<h2>Rewards")]
    assert "<small>1 problem; 27 of 28 rules checked</small>" in section
    assert "<h3>truncation <small>problem, since step 10</small></h3>" in section
    assert "completions/clipped_ratio</figcaption>" in section
    assert section.count("stroke-dasharray") == 1  # marks the step
    assert '<img class="small" width="8" height="8" alt="" src="data:image/png;base64,AAAA">' in section
    assert "<pre>user: 40</pre><pre>40</pre>" in section
    assert "<b>Remedy</b> Increase max_completion_length" in section
    assert "<td>not checked: kl is not logged</td>" in section
    assert section.count("<td>not found</td>") == 26


def test_page_of_a_healthy_run(tmp_path):
    folder = write_run(tmp_path / "run")
    assert cli.main(["report", str(folder)]) == 0
    assert "<h2>Doctor <small>No problem; 28 of 28 rules checked</small></h2><details>" in (folder / "report.html").read_text()
