"""The demo with a tool: its pages, tool, chat format and results, and a run of two steps, which cannot succeed."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from vlmkernels import cli
from vlmkernels.demo import zoom_page, zoom_run, zoom_task, zoom_warmup
from vlmkernels.demo.zoom_task import CELL, COLUMNS, FRAME, JITTER, NOTE, ROWS, SEEN, Pages, ZoomEnvironment
from vlmkernels.evaluate.digits import DIGIT_PIXELS, Scans, load_scans
from vlmkernels.evaluate.predictions import Completion
from vlmkernels.tools.calls import CallParser, ToolCall
from vlmkernels.tools.functions import Tools

torch.set_num_threads(1)
RED = (220, 30, 30)
SCHEMAS = Tools(environment_factory=ZoomEnvironment).schemas()
# "Scans" of one gray level, from which the digit can be read.
LEVELS = Scans(np.tile(np.arange(10, dtype=np.uint8)[:, None, None] * 20, (1, DIGIT_PIXELS, DIGIT_PIXELS)), np.arange(10))


@pytest.fixture(scope="module")
def processor():
    return zoom_task.build_processor()


def conversation(row: int, column: int, answer: str) -> list[dict]:
    """A page, a call, its result and an answer."""
    call = {"type": "function", "function": {"name": "zoom", "arguments": {"row": row, "column": column}}}
    turns = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "assistant", "content": answer}]
    tool = {"role": "tool", "name": "zoom", "content": [{"type": "image"}]}
    return [*zoom_task.question(zoom_task.FIND), turns[0], tool, turns[1]]


def test_the_tool_shows_each_note_at_full_resolution():
    for page in Pages(LEVELS, 5, seed=1):
        environment = ZoomEnvironment()
        assert environment.reset(**page) is None
        for row, column in np.ndindex(ROWS, COLUMNS):
            note = environment.zoom(row + 1, column + 1)
            assert note.size == NOTE
            assert note.mode == "RGB"
            pixels = np.asarray(note)
            number = "".join(str(pixels[:, x].mean() // 20)[0] for x in (0, NOTE[0] - 1))
            assert number == page["numbers"][row][column]
            assert (pixels == pixels[:1, :, :1]).all()  # no frame, and nothing of the desk
        assert page["numbers"][page["row"] - 1][page["column"] - 1] == page["answer"]
    for row, column in ((0, 1), (ROWS + 1, 1), (1, 0), (1, COLUMNS + 1)):
        with pytest.raises(ValueError, match=f"row must be 1 to 2 and column 1 to 4, got {row} and {column}"):
            environment.zoom(row, column)


def test_pages():
    pages = Pages(load_scans()[0], 60, seed=2)
    frames = set()
    for page in pages:
        pixels, notes = np.asarray(page["image"].convert("RGB")), np.array(page["notes"])
        assert pixels.shape == (ROWS * CELL, COLUMNS * CELL, 3)
        inside = notes - np.stack(np.meshgrid(np.arange(COLUMNS), np.arange(ROWS)), -1) * CELL
        assert (abs(inside + np.array(NOTE) / 2 - CELL / 2) <= JITTER).all()
        x, y = notes[page["row"] - 1, page["column"] - 1]
        is_red = (pixels == RED).all(-1)
        framed = np.zeros_like(is_red)
        framed[y - FRAME : y + NOTE[1] + FRAME, x - FRAME : x + NOTE[0] + FRAME] = True
        framed[y : y + NOTE[1], x : x + NOTE[0]] = False
        assert (is_red == framed).all()
        frames.add((page["row"], page["column"]))
    assert len(frames) == ROWS * COLUMNS
    assert pages[7]["image"].tobytes() == pages[7]["image"].tobytes() != Pages(pages.scans, 60, seed=3)[7]["image"].tobytes()
    with pytest.raises(IndexError, match=r"index must be in \[0, 60\), got 60"):
        pages[60]


def test_the_model_sees_pages_in_miniature_and_notes_unchanged(processor):
    page = Pages(load_scans()[0], 1, seed=0)[0]
    environment = ZoomEnvironment()
    environment.reset(**page)
    note = environment.zoom(1, 1)
    inputs = processor.image_processor(images=[page["image"].convert("RGB"), note], return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 2, 4], [1, 2, 4]]
    assert SEEN == (4 * 14, 2 * 14) == (page["image"].width // 10, page["image"].height // 10) == NOTE
    # The patches of a note are its pixels.
    same = processor.image_processor(images=[note], do_resize=False, return_tensors="pt")["pixel_values"]
    assert torch.equal(inputs["pixel_values"][8:], same)


def test_chat_format(processor):
    tokenizer = processor.tokenizer
    messages = conversation(2, 3, "47")
    text = processor.apply_chat_template(messages, tokenize=False, tools=SCHEMAS)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert text == (
        "<|im_start|>system\nzoom(row, column)<|im_end|>\n"
        f"<|im_start|>user\n{image}Read the number in the red frame.<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>{"name": "zoom", "arguments": {"row": 2, "column": 3}}</tool_call><|im_end|>\n'
        f"<|im_start|>tool\n{image}<|im_end|>\n"
        "<|im_start|>assistant\n47<|im_end|>\n"
    )
    assert "system" not in processor.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    start, end = text.index("<tool_call>"), text.index("<|im_end|>", text.index("</tool_call>"))
    ids = tokenizer.encode(text[start:end])
    assert len(ids) == 13
    assert CallParser(tokenizer, processor.chat_template)(ids, SCHEMAS).calls == [ToolCall("zoom", {"row": 2, "column": 3})]
    result = text[end + len("<|im_end|>") : text.index("47")].replace("<|image_pad|>", "<|image_pad|><|image_pad|>")
    assert len(ids) + 1 + len(tokenizer.encode(result)) + zoom_run.ANSWER_TOKENS <= zoom_run.TOKENS


def test_labels_are_the_turns_of_the_model(processor):
    rng = np.random.default_rng(0)
    makers = (
        zoom_warmup.read_note,
        zoom_warmup.locate_frame,
        zoom_warmup.answer_directly,
        zoom_warmup.call_tool,
        zoom_warmup.read_result,
        zoom_warmup.call_or_answer,
    )
    conversations = [maker(load_scans()[0], rng) for maker in makers for _ in range(3)]
    encoded = zoom_warmup.encode(processor, conversations)
    for ids, label, made in zip(encoded["input_ids"], encoded["labels"], conversations, strict=True):
        turns = []
        for message in made.messages:
            if message["role"] == "assistant":
                calls = [json.dumps(call["function"]) for call in message.get("tool_calls", ())]
                turns.append(message["content"] + "".join(f"<tool_call>{call}</tool_call>" for call in calls) + "<|im_end|>")
        assert processor.tokenizer.decode(label[label != -100]) == "".join(turns[-1:] if made.last_only else turns)
        assert (label[label != -100] == ids[label != -100]).all()
        assert ("system" in processor.tokenizer.decode(ids)) == made.has_tool


def test_conversations_of_the_warm_up_are_true():
    """A call gets the note that it asks for, and the answer is the number of that note."""
    rng, right = np.random.default_rng(1), 0
    for _ in range(200):
        made = zoom_warmup.call_tool(LEVELS, rng)
        whole, note = (np.asarray(image) for image in made.images)
        arguments = made.messages[1]["tool_calls"][0]["function"]["arguments"]
        assert made.messages[-1]["content"] == "".join(str(note[0, x, 0] // 20) for x in (0, -1))
        ys, xs = np.nonzero((whole == RED).all(-1))
        framed = {"row": int(ys.mean()) // CELL + 1, "column": int(xs.mean()) // CELL + 1}
        right += arguments == framed
        located = zoom_warmup.locate_frame(LEVELS, rng)
        ys, xs = np.nonzero((np.asarray(located.images[0]) == RED).all(-1))
        assert located.messages[-1]["content"] == f"row {int(ys.mean()) // CELL + 1} column {int(xs.mean()) // CELL + 1}"
    assert right / 200 == pytest.approx(zoom_warmup.FOUND + (1 - zoom_warmup.FOUND) / (ROWS * COLUMNS), abs=0.1)


def test_right_note():
    completions = [conversation(1, 2, "47")[1:], conversation(2, 2, "47")[1:], [{"role": "assistant", "content": "47"}]]
    completions.append(completions[0][:2] + completions[1])
    assert zoom_run.right_note(completions, row=[1, 1, 1, 1], column=[2, 2, 2, 2]) == [1.0, 0.0, None, 0.5]


def outcome(texts: list[str], has_tool: bool, right: list[float | None]) -> zoom_page.Outcome:
    image = Image.new("RGB", (8, 4))
    pages = [{"answer": "47", "image": image, "row": 1, "column": 1} for _ in texts]
    completions = [
        Completion(text, turns=[], tool_calls=int(share is not None), rewards={"right_note": share})
        for text, share in zip(texts, right, strict=True)
    ]
    return zoom_page.Outcome("after GRPO", has_tool, completions, pages)


def test_outcome_and_page(tmp_path):
    with_tool = outcome(["47", "74", " 47\n", ""], True, [1.0, None, 0.0, 1.0])
    assert with_tool.correct.tolist() == [True, False, True, False]
    assert (with_tool.accuracy.value, with_tool.calls, with_tool.right_calls) == (0.5, 0.75, pytest.approx(2 / 3))
    without = outcome(["1", "47", "", ""], False, [None] * 4)
    assert (without.accuracy.value, without.right_calls) == (0.25, None)
    log = [{"step": step, "rewards/exact_match/mean": step / 4, "tools/call_frequency": 1 / step} for step in (1, 2, 3)]
    zoom_page.write_page(tmp_path / "index.html", "<four pages>", [without, without, with_tool], log)
    page = (tmp_path / "index.html").read_text()
    assert "&lt;four pages&gt;" in page
    assert re.findall(r"<td>(with(?:out)?) the tool, after GRPO</td><td><b>([\d.]+%)", page) == [
        ("without", "25.0%"),
        ("without", "25.0%"),
        ("with", "50.0%"),
    ]
    assert page.count("<figure>") == 2
    assert page.count('<div class="card"') == 4  # the mistakes are already among the first pages
    assert "http" not in page


def test_two_steps(tmp_path, monkeypatch, capsys):
    stages = tuple(stage._replace(min_steps=0, max_steps=1) for stage in zoom_warmup.STAGES)
    monkeypatch.setattr(zoom_warmup, "STAGES", stages)
    monkeypatch.setattr(zoom_warmup, "NUM_CHECKED", 4)
    monkeypatch.setattr(zoom_run, "NUM_TEST", 6)
    monkeypatch.setattr(zoom_run, "PAGES", 2)
    monkeypatch.setitem(zoom_run.GRPO, "per_device_train_batch_size", 4)
    monkeypatch.setitem(zoom_run.GRPO, "num_generations", 2)
    assert cli.main(["demo", "--tools", "--steps", "2", "--seed", "3", "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "FAILED the accuracy with the tool must be at least 30 points above the best without it" in printed
    assert all(f"  {stage.name}: 1 steps" in printed for stage in stages)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["seed"], metrics["steps"]) == (3, 2)
    assert [(result["tool"], result["name"]) for result in metrics["outcomes"]] == [
        *((False, f"after {training}") for training in ("the warm-up", "GRPO", "supervised training")),
        *((True, f"after {training}") for training in ("the warm-up", "GRPO")),
    ]
    best = max(result["accuracy"]["value"] for result in metrics["outcomes"] if not result["tool"])
    assert metrics["gain"] == metrics["outcomes"][-1]["accuracy"]["value"] - best
    assert set(metrics["seconds"]) == {"warm-up", "without the tool", "GRPO with the tool"}
    steps = [entry for entry in metrics["log"] if "reward" in entry]
    assert [entry["step"] for entry in steps] == [1, 2]
    for entry in steps:
        assert {"tools/call_frequency", "tools/zoom/calls", "rewards/right_note/mean"} <= set(entry)
        assert entry["reward"] == pytest.approx(entry["rewards/exact_match/mean"])  # the other reward has weight 0
    assert "data:image/png" in (tmp_path / "index.html").read_text()
    assert (tmp_path / "model" / "chat_template.jinja").read_text() == zoom_task.CHAT_TEMPLATE
    # The trainer's page shows the run, with its trajectories.
    assert cli.main(["report", str(tmp_path)]) == 0
    assert "Read the number in the red frame." in (tmp_path / "report.html").read_text()


def test_one_task_at_a_time(capsys):
    with pytest.raises(SystemExit):
        cli.main(["demo", "--suite", "--tools"])
    assert "--tools: not allowed with argument --suite" in capsys.readouterr().err
