"""Stored completions, their pages, and the tables that loggers receive."""

import importlib.util
import json
import math

import pytest
import torch
from PIL import Image
from support.recorded_runs import build

from vlmkernels.record import completions, loggers
from vlmkernels.record.callback import json_line
from vlmkernels.record.completions import CompletionRow
from vlmkernels.record.files import append_atomic

torch.set_num_threads(1)


def groups_of(text="x", reward=0.5) -> completions.Groups:
    image = Image.new("RGB", (8, 4), "red")
    references = {"answer": f"ref {text}"}
    rewards = {"a": reward, "<b>": math.nan}
    return [[CompletionRow("what?", [image], f"{text} {k}", rewards, k - 0.5, references) for k in range(2)]]


def test_steps_of_completions_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(completions, "MAX_STEPS", 10)
    for step in range(1, 200):
        completions.save_step(tmp_path, step, groups_of())
    steps = list(completions.stored_steps(tmp_path))
    assert len(steps) <= 10
    assert (steps[0], steps[-1]) == (1, 199)
    assert len(list(tmp_path.iterdir())) == 2 * len(steps)  # nothing else is left


def test_stored_completions(tmp_path):
    completions.save_step(tmp_path, 7, groups_of("</pre><script>"))
    content = completions.load_step(tmp_path / "step-000007.json")
    assert [row["rewards"] for row in content["groups"][0]["completions"]] == [{"a": 0.5, "<b>": None}] * 2
    shown = (tmp_path / "step-000007.html").read_text()
    assert "<script>" not in shown
    assert "&lt;b&gt;" in shown
    assert "answer: ref &lt;/pre&gt;&lt;script&gt;" in shown
    del content["groups"][0]["references"]  # as in files of earlier versions
    (tmp_path / "step-000007.json").write_text(json.dumps(content))
    assert completions.load_step(tmp_path / "step-000007.json")["groups"][0]["references"] == {}
    for broken in ("{", '{"groups": [{}]}', json.dumps(content).replace("data:image/", "https://x.org/"), "[]"):
        (tmp_path / "step-000007.json").write_text(broken)
        with pytest.raises(ValueError, match=r"step-000007.json must hold completions that the trainer stored, got"):
            completions.load_step(tmp_path / "step-000007.json")


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_loggers_get_completions_with_images(tmp_path, monkeypatch, name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    for variable, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    if name != "tensorboard":
        module, tables = importlib.import_module(name), []
        make = module.Table.__init__

        def record(table, *args, **kwargs):
            tables.append(table)
            make(table, *args, **kwargs)

        monkeypatch.setattr(module.Table, "__init__", record)
    build(tmp_path / "run", log_completions=True, report_to=name).train()
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (folder,) = (tmp_path / "run" / "runs").iterdir()
        events = EventAccumulator(str(folder)).Reload()
        assert events.Tags()["images"] == [f"completions/prompt {k}, image 1" for k in (1, 2)]
        text = events.Tensors("completions/prompt 1/text_summary")[0].tensor_proto.string_val[0].decode()
        assert text.count("\n|") == 2 + 4
        assert "train/tokens_run" in events.Tags()["scalars"]
        return
    if name == "wandb":
        module.finish()
    (made,) = tables
    rows = made.data if name == "wandb" else [list(row.values()) for row in made.data]
    columns = made.columns if name == "wandb" else list(made.data[0])
    assert columns == ["step", "image 1", "prompt", "completion", "length_reward", "vowel_reward", "advantage"]
    assert len(rows) == 8
    assert len({id(row[1]) for row in rows}) == 2  # one image per prompt
    assert list(tmp_path.rglob("completions_*.table.json" if name == "wandb" else "media/**/*.png"))


def test_lone_surrogates_are_stored(tmp_path):
    """A tokenizer can return half of a surrogate pair, which has no UTF-8."""
    groups = groups_of("half \ud83d")
    completions.save_step(tmp_path, 1, groups)
    content = completions.load_step(tmp_path / "step-000001.json")
    assert content["groups"][0]["completions"][0]["text"] == "half \ud83d 0"
    assert "half \\ud83d 0" in (tmp_path / "step-000001.html").read_text(encoding="utf-8")
    append_atomic(tmp_path / "metrics.jsonl", json_line({"text": "\ud83d"}))
    assert json.loads((tmp_path / "metrics.jsonl").read_text(encoding="utf-8")) == {"text": "\ud83d"}
    _, (row, *_) = loggers._table(1, groups, lambda image: None)
    assert "half \\ud83d 0" in row
