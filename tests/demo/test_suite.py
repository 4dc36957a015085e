"""The demo on the benchmark shapes-and-digits: a run of two steps, which cannot succeed, and its tokenizer."""

import json

import pytest

from vlmkernels import cli
from vlmkernels.demo import suite as demo
from vlmkernels.demo.model import build_tokenizer
from vlmkernels.evaluate import shapes_and_digits as suite


def test_two_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "SEEING_STEPS", 1)
    monkeypatch.setattr(demo, "ANSWER_STEPS", 1)
    monkeypatch.setattr(demo, "ANSWER_ROWS", 12)
    monkeypatch.setitem(demo.GRPO, "per_device_train_batch_size", 12 * 2)
    monkeypatch.setitem(demo.GRPO, "num_generations", 2)
    monkeypatch.setitem(suite.SPLITS, "train", 1200)
    monkeypatch.setitem(suite.SPLITS, "test", 12)
    assert cli.main(["demo", "--suite", "--steps", "2", "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "FAILED GRPO must raise the accuracy over all categories" in printed
    assert all(f"\n{category} " in printed for category in suite.CATEGORIES)
    result = json.loads((tmp_path / "eval.json").read_text())
    assert set(result["metrics"]) == set(result["before"]) == {"all", *suite.CATEGORIES}
    assert {"value", "low", "high", "hidden", "cost"} < set(result["metrics"]["grounding"]["miou"])
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert {f"rewards/{category}/mean" for category in suite.CATEGORIES} < set(log[0])
    assert "after GRPO compared with before GRPO" in (tmp_path / "eval.html").read_text()

    # `vlmkernels eval` reads the saved model and finds the same accuracy.
    flags = [
        "--dataset",
        suite.NAME,
        "--max_completion_length",
        str(demo.ANSWER_TOKENS),
        "--output",
        str(tmp_path / "again.json"),
    ]
    assert cli.main(["eval", "--model", str(tmp_path / "model"), *flags]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["metrics"]["all"]["accuracy"]["value"] == result["metrics"]["all"]["accuracy"]["value"]
    assert again["completions"]["mean_length"] == pytest.approx(result["metrics"]["all"]["mean_length"]["value"])


def test_every_word_is_a_token_and_every_answer_fits():
    rows = suite.ShapesAndDigits("train", 600)
    tokenizer = build_tokenizer(demo.words(rows))
    for row in rows:
        for word in row["prompt"][0]["content"][0]["text"].rstrip("?.").split():
            assert len(tokenizer.tokenize(f" {word}")) <= 2  # a first word has no space before it
        assert (
            len(tokenizer.tokenize(row["answer"]))
            == (1 if row["answer"].isalpha() else len(row["answer"]))
            < demo.ANSWER_TOKENS
        )
