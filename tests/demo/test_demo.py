"""The demo: its model built in code, and a run of two steps, which cannot succeed."""

import json
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmkernels import cli
from vlmkernels.demo import run, warmup
from vlmkernels.demo.model import SPECIAL_TOKENS, build_model, build_processor, prompt_texts, read_numbers
from vlmkernels.evaluate.digits import PROMPT, compose, load_scans

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def rows():
    return compose(load_scans()[1], 9, np.random.default_rng(0))


def test_a_digit_is_one_image_token(processor, rows):
    inputs = processor(text=prompt_texts(processor, rows), images=[row["image"] for row in rows], padding=True)
    tokens = (torch.as_tensor(inputs["input_ids"]) == processor.image_token_id).sum(1)
    assert tokens.tolist() == [len(row["answer"]) for row in rows]
    assert torch.as_tensor(inputs["image_grid_thw"]).tolist() == [[1, 2, 2 * len(row["answer"])] for row in rows]


def test_tokenizer(processor):
    tokenizer = processor.tokenizer
    for token in SPECIAL_TOKENS:
        assert tokenizer.encode(token) == [tokenizer.convert_tokens_to_ids(token)]
    assert sorted(map(tokenizer.convert_tokens_to_ids, SPECIAL_TOKENS)) == sorted(tokenizer.all_special_ids)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.tokenize(PROMPT) == ["Read", "Ġthe", "Ġnumber", "."]
    assert len(tokenizer.encode("0123456789")) == 10
    assert tokenizer.decode(tokenizer.encode("Größe: 12 µm\n")) == "Größe: 12 µm\n"


def test_labels_are_the_answer_and_the_end(processor, rows):
    labels = warmup.encode(processor, rows)["labels"]
    for label, row in zip(labels, rows, strict=True):
        assert processor.tokenizer.decode(label[label != -100]) == f"{row['answer']}<|im_end|>"


def test_saved_model_and_processor_answer_alike(processor, rows, tmp_path):
    model = build_model(processor, seed=0)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert [type(part) for part in loaded] == [type(model), type(processor)]
    answers = read_numbers(model, processor, rows)
    assert len(set(answers)) > 1
    assert read_numbers(*loaded, rows) == answers


@pytest.mark.parametrize(("before", "after", "broken"), [(0.6, 0.9, 0), (0.7, 0.84, 1), (0.5, 0.7, 1), (0.6, 0.6, 3)])
def test_requirements(before, after, broken):
    assert len(run.failures(before, after)) == broken


def test_run_that_does_not_improve(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(warmup, "MAX_STEPS", 1)
    monkeypatch.setattr(run, "NUM_TRAIN", 64)
    monkeypatch.setattr(run, "NUM_TEST", 24)
    assert cli.main(["demo", "--steps", "2", "--seed", "3", "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "FAILED GRPO must raise the held-out accuracy by at least 15 points" in printed
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["seed"] == 3
    assert {"accuracy_before", "accuracy_after", "warmup_seconds", "train_seconds", "machine", "versions"} < set(metrics)
    shares, seconds = metrics["image_share_of_step"], metrics["image_seconds_per_step"]
    assert 0 < shares["after"] < 1
    assert shares["before"] == pytest.approx(  # the rest of the step is the same
        seconds["before"] / (metrics["step_seconds"] - seconds["after"] + seconds["before"]), abs=0.02
    )
    shown = int(re.search(r"Images: (\d+)% of a step", printed)[1])
    assert shown == pytest.approx(100 * shares["after"], abs=0.6)
    assert metrics["curves"]["step"] == [1, 2]
    assert len(metrics["curves"]["held_out_accuracy"]) == 2  # before, and after the last step
    page = (tmp_path / "samples.html").read_text()
    assert page.count("data:image/png") >= 24
    assert "http" not in page
    assert (tmp_path / "curves.png").stat().st_size > 10_000

    # `vlmkernels eval` reads the saved model and dataset and finds the same accuracy.
    paths = ["--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "test.jsonl"), "--batch_size", "24"]
    assert cli.main(["eval", *paths, "--max_completion_length", "4", "--output", str(tmp_path / "eval.json")]) == 0
    assert json.loads((tmp_path / "eval.json").read_text())["accuracy"] == pytest.approx(metrics["accuracy_after"])
