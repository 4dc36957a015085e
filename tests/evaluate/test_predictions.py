"""Predictions: sampling them, resuming a killed run, hiding images, and invalid files."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from support import tiny

from vlmkernels.data.samples import read_sample
from vlmkernels.evaluate.evaluation import Evaluation, Scoring
from vlmkernels.evaluate.predictions import Predictions
from vlmkernels.evaluate.sampling import Decoding, hide_images, predict

torch.set_num_threads(1)


def sampling(path: Path):
    """Arguments of predict: two completions of five samples."""
    decoding = Decoding(num_generations=2, temperature=1.0, max_completion_length=4, batch_size=2)
    return tiny.vlm(), tiny.processor(), tiny.rows(5, "mixed"), decoding, path


def die_in_the_third_line(path: Path) -> None:
    append = Predictions.append

    def append_or_die(self, *batch):
        append(self, *batch)
        if len(self.by_sample) == 2:
            with self.path.open("a") as file:
                file.write('{"index": 2, "view": "ima')
            os.kill(os.getpid(), signal.SIGKILL)

    Predictions.append = append_or_die
    predict(*sampling(path))


def test_a_killed_run_resumes_where_it_stopped(tmp_path):
    path = tmp_path / "killed.jsonl"
    run = multiprocessing.get_context("fork").Process(target=die_in_the_third_line, args=(path,))
    run.start()
    run.join(120)
    assert run.exitcode == -signal.SIGKILL
    kept = path.read_text().splitlines()
    assert len(kept) == 1 + 2 + 1  # settings, two samples, an incomplete line

    arguments = sampling(path)
    sampled = []
    predictions = predict(*arguments, progress=lambda done, total: sampled.append((done, total)))
    assert sampled == [(3, 5), (4, 5), (5, 5)]
    lines = path.read_text().splitlines()
    assert lines[:3] == kept[:3]
    assert [json.loads(line)["index"] for line in lines[1:]] == [0, 1, 2, 3, 4]
    whole = predict(*sampling(tmp_path / "whole.jsonl"))
    assert whole.by_sample == predictions.by_sample
    assert len({completion.text for group in whole.by_sample.values() for completion in group}) > 2
    assert Predictions.read(path).by_sample == whole.by_sample

    model, processor, data, _, _ = arguments
    other = Decoding(num_generations=2, temperature=0.5, max_completion_length=4)
    with pytest.raises(ValueError, match=r"killed.jsonl was made with other settings: temperature 1.0, now 0.5"):
        predict(model, processor, data, other, path)
    model.lm_head.weight.data[0] += 1
    with pytest.raises(ValueError, match="other settings: model "):
        predict(*arguments)
    assert path.read_text().splitlines() == lines


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "num_generations": 3, "seed": 5}], ids=["greedy", "sampled"])
def test_batch_size_changes_nothing(tmp_path, options):
    model, processor, rows = tiny.vlm(), tiny.processor(), tiny.rows(7, "mixed")
    found = [
        predict(
            model, processor, rows, Decoding(max_completion_length=6, batch_size=size, **options), tmp_path / f"{size}.jsonl"
        )
        for size in (1, 4, 7)
    ]
    assert found[0].by_sample == found[1].by_sample == found[2].by_sample
    if options:
        other = Decoding(max_completion_length=6, **{**options, "seed": 6})
        assert predict(model, processor, rows, other, tmp_path / "other.jsonl").by_sample != found[0].by_sample


@pytest.mark.parametrize(("opened", "has_format", "cut_off"), [(True, 1, 1), (False, 0, 0), (None, 1, 0)])
def test_prompts_that_end_with_think(tmp_path, opened, has_format, cut_off):
    """Predictions say so for every completion, and the format and the parsing of answers depend on it."""
    rows = [{"prompt": [{"role": "user", "content": "1?"}], "task": "exact", "answer": "1"}]
    if opened is not None:
        model, tokenizer = tiny.text_model(), tiny.tokenizer()
        tokenizer.add_tokens(["<think>"])
        model.resize_token_embeddings(len(tokenizer))
        if opened:
            tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n", "assistant\n<think>\n")
        predictions = predict(model, tokenizer, rows, Decoding(max_completion_length=3), tmp_path / "sampled")
        assert [completion.think_opened for completion in predictions.by_sample[0, "image"]] == [opened]
    for text, metric, expected in (
        ("One.</think><answer>1</answer>", "format_rate", has_format),
        ("It is", "parse_failure_rate", cut_off),
    ):
        path = tmp_path / metric
        path.write_text(json.dumps({"index": 0, "completions": [{"text": text, "think_opened": opened}]}) + "\n")
        evaluation = Evaluation(Predictions.read(path), rows, Scoring(metrics=(metric,), replicates=2))
        assert [result.estimate.value for result in evaluation.results if result.metric == metric] == [expected]


def test_hidden_images(tmp_path):
    rows = tiny.rows(2, "one")
    sample = read_sample(rows[0], 0)
    gray = hide_images(sample, "grey")
    assert [image.size for image in gray.images] == [image.size for image in sample.images]
    assert gray.images[0].getcolors() == [(28 * 28, (128, 128, 128))]
    none = hide_images(sample, "none")
    assert none.images == []
    assert [part["type"] for part in none.prompt[0]["content"]] == ["text"]
    predictions = predict(
        tiny.vlm(), tiny.processor(), rows, Decoding(max_completion_length=2), tmp_path / "p", views=("image", "none")
    )
    assert {view for _, view in predictions.by_sample} == {"image", "none"}
    with pytest.raises(ValueError, match="sample 0: prompt must be a conversation to remove images from it"):
        hide_images(read_sample({"prompt": "<|image_pad|>what?", "image": rows[0]["image"]}, 0), "none")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "p.jsonl, line 1: must be JSON, got '{'"),
        (["[1]"], "p.jsonl, line 1: must be a JSON object"),
        (['{"completion": "a"}'], "p.jsonl, line 1: index must be a sample's number, from 0, got None"),
        (['{"index": 0}'], "p.jsonl, line 1: completions must be a list with at least one completion, got None"),
        (['{"index": 0, "completions": [3]}'], "p.jsonl, line 1: completion must be a text or an object with .text., got 3"),
        *(
            ([f'{{"index": 0, "completions": [{{"text": "a", {field}}}]}}'], f"p.jsonl, line 1: {message}")
            for field, message in (
                ('"length": "many"', "length must be a number, got 'many'"),
                ('"truncated": "no"', "truncated must be true or false, got 'no'"),
                ('"ids": [1, "2"]', "ids must be a list of token ids, got "),
                ('"rewards": {"iou": "high"}', "rewards must be numbers by name, got "),
            )
        ),
        (
            ['{"index": 0, "completion": "a", "resized": 3}'],
            "p.jsonl, line 1: resized must be a list of widths and heights, got 3",
        ),
        (['{"index": 0, "completion": "a"}'] * 2, "p.jsonl, line 2: index must occur only once per view, got 0 again"),
        (['{"index": 0, "completion": "a"}'], "sample 1: .*p.jsonl has no completions of this sample"),
        (
            ['{"index": 0, "completion": "a"}', '{"index": 1, "completions": ["a", "b"]}'],
            "sample 1: must have 1 completions like sample 0, got 2",
        ),
        (
            [f'{{"index": {i}, "completion": "a"}}' for i in range(3)],
            "predictions must have no samples beyond the dataset's 2, got index 2",
        ),
    ],
)
def test_bad_predictions(tmp_path, lines, message):
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises((ValueError, TypeError), match=message):
        Evaluation(Predictions.read(path), [{"prompt": "?", "answer": "a"}] * 2)


def test_bad_decoding():
    with pytest.raises(ValueError, match="temperature must be > 0 for several completions"):
        Decoding(num_generations=2)
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        Decoding(batch_size=0)
