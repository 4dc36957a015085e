"""Stored completions and trajectories, their pages, and the tables that loggers receive."""

import importlib.util
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from support import tiny
from support.recorded_runs import build

from vlmkernels.data.samples import read_sample
from vlmkernels.record import completions, loggers
from vlmkernels.record.callback import json_line
from vlmkernels.record.completions import CompletionRow
from vlmkernels.record.files import append_atomic
from vlmkernels.record.html import thumbnail
from vlmkernels.record.turns import CallRow, TurnRow, count, from_json, to_json, transcript, turn_rows
from vlmkernels.rewards import Rewards
from vlmkernels.rollout.score import score
from vlmkernels.train.logs import completion_groups

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


def picture(color: str) -> Image.Image:
    return Image.new("RGB", (8, 4), color)


def messages(answer="red", color="red", name="zoom", error="{'error': 'too small'}") -> list[dict]:
    """A trajectory of three turns; the first of its three calls fails."""

    def call(**arguments) -> dict:
        return {"type": "function", "function": {"name": name, "arguments": arguments}}

    parts = [{"type": "text", "text": "crop "}, {"type": "image", "image": picture(color)}, {"type": "text", "text": "1"}]
    return [
        {"role": "assistant", "content": answer, "tool_calls": [call(x=1)], "reasoning_content": f"see {answer}"},
        {"role": "tool", "name": name, "content": error},
        {"role": "assistant", "content": "", "tool_calls": [call(x=2, label=answer), call(x=3)]},
        {"role": "tool", "name": name, "content": parts},
        {"role": "tool", "name": name, "content": [{"type": "image", "image": picture("blue")}]},
        {"role": "assistant", "content": f"<answer>{answer}</answer>"},
    ]


def trajectory(answer="red", trained=True, **options) -> CompletionRow:
    turns = turn_rows(messages(answer, **options), trained=trained)
    return CompletionRow("what?", [picture("green")], f"<answer>{answer}</answer>", {"a": 0.5}, 0.5, {}, turns)


def test_turns_of_messages():
    turns = turn_rows(messages(), trained=True, rewards=[0.25, math.nan])
    red, blue = (thumbnail(picture(color)) for color in ("red", "blue"))
    calls = [CallRow("zoom", '{"x": 2, "label": "red"}'), CallRow("zoom", '{"x": 3}')]
    assert turns == [
        TurnRow("assistant", "red", "see red", calls=[CallRow("zoom", '{"x": 1}')], trained=True, reward=0.25),
        TurnRow("tool", "{'error': 'too small'}", name="zoom", error=True),
        TurnRow("assistant", "", calls=calls, trained=True),
        TurnRow("tool", "crop 1", name="zoom", images=[red]),
        TurnRow("tool", "", name="zoom", images=[blue]),
        TurnRow("assistant", "<answer>red</answer>", trained=True),
    ]
    assert str(count(turns)) == "3 turns · 3 calls · 1 failure"
    assert transcript(turns) == (
        "model: see red\nred\nzoom {\"x\": 1}\nzoom: {'error': 'too small'}\n"
        'model: zoom {"x": 2, "label": "red"}\nzoom {"x": 3}\n'
        "zoom: crop 1\n[image, 32 x 16]\nzoom: [image, 32 x 16]\nmodel: <answer>red</answer>"
    )
    places = {blue: 0}
    stored = json.loads(json.dumps(to_json(turns, places)))
    assert [turn.get("images") for turn in stored] == [None, None, None, [1], [0], None]
    assert from_json(stored, list(places)) == turns


def test_a_group_stores_equal_images_once(tmp_path):
    groups = [[trajectory("red"), trajectory("blue"), trajectory("red", color="black", trained=False)]] * 2
    completions.save_step(tmp_path, 1, groups)
    text = (tmp_path / "step-000001.json").read_text()
    for color, times in (("red", 2), ("blue", 2), ("black", 2), ("green", 2)):  # once in each of two groups
        assert text.count(thumbnail(picture(color)).source) == times
    content = completions.load_step(tmp_path / "step-000001.json")
    group = content["groups"][0]
    stored = [from_json(row["turns"], group["tool_images"]) for row in group["completions"]]
    assert stored == [row.turns for row in groups[0]]
    shown = (tmp_path / "step-000001.html").read_text()
    assert shown.count("data:image/") == 2 * 4  # those of results as variables of the section, which every use names
    assert sorted(re.findall(r"var\((--shot-\d)\)", shown.split("</section>")[0])) == [
        *("--shot-0", "--shot-0", "--shot-1", "--shot-1", "--shot-1", "--shot-2")
    ]
    section = shown.split("<section")[1]
    assert section.count('class="turn trained"') == 2 * 3
    assert section.count('class="turn error"') == section.count("{&#x27;error&#x27;: &#x27;too small&#x27;}") == 3
    assert section.count("3 turns · 3 calls · 1 failure</small>") == 2
    assert section.count("3 turns · 3 calls · 1 failure · not trained on</small>") == 1
    assert '<pre class="call"><b>zoom</b> {&quot;x&quot;: 3}</pre>' in section
    assert "trained on</span></p>" in shown
    completions.save_step(tmp_path, 2, groups_of())
    assert "turn" not in (tmp_path / "step-000002.json").read_text()
    assert 'class="legend"' not in (tmp_path / "step-000002.html").read_text()


def test_prompts_that_a_group_does_not_share(tmp_path):
    """Environments can begin differently, and then append something else to the prompt of a group."""
    row = trajectory("red")
    completions.save_step(tmp_path, 1, [[row, row, replace(row, prompt="Start at 3.", images=[picture("black")])]])
    group = completions.load_step(tmp_path / "step-000001.json")["groups"][0]
    first, second, third = (from_json(row["turns"], group["tool_images"]) for row in group["completions"])
    assert first == second == row.turns
    assert third == [TurnRow("user", "Start at 3.", images=[thumbnail(picture("black"))]), *row.turns]
    assert "<small>prompt</small><div><pre>Start at 3.</pre>" in (tmp_path / "step-000001.html").read_text()


class Tags(HTMLParser):
    """The tags of a page, which must be closed in order, and the values of attributes with code or other sources."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.code = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.code += [name for name, value in attrs if name.startswith("on") or "javascript:" in (value or "")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_pages_of_trajectories_escape_everything(tmp_path):
    found = []
    for text in ("word", "</pre></style><script>alert(1)</script><img src=x onerror=alert(1)>\"');} b"):
        completions.save_step(tmp_path, 1, [[trajectory(text, name=text, error="{'error': " + text)]])
        found.append(Tags((tmp_path / "step-000001.html").read_text()))
    assert found[0].tags == found[1].tags
    assert not found[1].code
    path = tmp_path / "step-000001.json"
    content = json.loads(path.read_text())
    turns = content["groups"][0]["completions"][0]["turns"]
    for change in (
        {"images": [5]},
        {"role": "system"},
        {"text": 3},
        {"reward": "high"},
        {"size": 1},
        {"calls": [{"name": "a"}]},
    ):
        turns[0], kept = {**turns[0], **change}, turns[0]
        path.write_text(json.dumps(content))
        turns[0] = kept
        with pytest.raises(ValueError, match=r"step-000001.json must hold completions that the trainer stored"):
            completions.load_step(path)
    content["groups"][0]["tool_images"][0][0] = "data:image/png;base64,AAAA'); background: url('https://x.org/a.png"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="the source of an image must be a data URI"):
        completions.load_step(path)


def test_loggers_get_trajectories_as_text():
    columns, rows = loggers._table(3, [[trajectory("red")]], lambda image: image.size)
    assert columns == ["step", "image 1", "prompt", "completion", "a", "advantage"]
    assert rows == [[3, (8, 4), "what?", transcript(turn_rows(messages("red"))), 0.5, 0.5]]


def test_rows_of_scored_trajectories():
    """The loss counts no token of a masked completion. Turns have the rewards that functions gave them."""

    def per_turn(completions) -> list:
        return [[0.5, None, 1.0], 2.0, 3.0]

    episodes = [
        SimpleNamespace(messages=messages(answer), images=[], environment=None, rewards={}, num_turns=3, lost=None)
        for answer in ("red", "blue", "black")
    ]
    sample = read_sample({**tiny.rows(1, "one")[0], "answer": "red"}, 0)
    rewards = Rewards(["exact_match", per_turn])
    scored = score(rewards, [sample] * 3, [""] * 3, [[]] * 3, [None] * 3, episodes=episodes)
    args = SimpleNamespace(num_completions_to_print=2, num_generations=3)
    advantages = torch.tensor([1.0, -0.5, 0.0])
    ((first, second),) = completion_groups(scored, advantages, torch.tensor([True, False, True]), rewards, args)
    assert (first.rewards, second.rewards) == ({"exact_match": 1.0, "per_turn": 1.5}, {"exact_match": 0.0, "per_turn": 2.0})
    assert (first.completion, second.completion) == ("<answer>red</answer>", "<answer>blue</answer>")
    assert first.turns == turn_rows(messages("red"), trained=True, rewards=[0.5, math.nan, 1.0])
    assert second.turns == turn_rows(messages("blue"))
    plain = score(Rewards("cer"), [sample] * 3, ["red"] * 3, [[]] * 3, [None] * 3)
    (rows,) = completion_groups(plain, advantages, torch.ones(3, dtype=torch.bool), Rewards("cer"), args)
    assert [row.turns for row in rows] == [[], []]
