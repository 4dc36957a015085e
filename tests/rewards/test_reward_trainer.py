"""Rewards in the trainer: what functions receive, and errors before the first step."""

import math

import pytest
import torch
from support import tiny

from vlmkernels.rollout import score
from vlmkernels.train import GRPOConfig, GRPOTrainer

torch.set_num_threads(1)


def scaled(completions, length, factor=1.0, **kwargs):
    return [factor * n for n in length]


def test_missing_column_is_named_before_a_step_is_taken(tmp_path):
    rows = [{"prompt": row["prompt"]} for row in tiny.rows(4, "none")]
    args = GRPOConfig(output_dir=str(tmp_path), num_generations=2, per_device_train_batch_size=2)
    for reward, column in (("cer", "answer"), ({"name": "iou", "column": "box"}, "box"), (scaled, "length")):
        name = reward["name"] if isinstance(reward, dict) else getattr(reward, "__name__", reward)
        with pytest.raises(
            ValueError, match=f"train_dataset must have a column '{column}', which reward {name} needs, got prompt"
        ):
            GRPOTrainer(tiny.text_model(), [reward], args, rows, processing_class=tiny.tokenizer())


def test_a_reference_of_the_wrong_kind_is_named_before_a_step_is_taken(tmp_path):
    rows = [{**row, "answer": answer} for row, answer in zip(tiny.rows(3, "none"), (1, None, "cat"), strict=True)]
    args = GRPOConfig(output_dir=str(tmp_path), num_generations=2, per_device_train_batch_size=2)
    for reward in ("numeric", {"name": "cosine_length", "max_length": 9, "correct": "numeric"}):
        name = reward if isinstance(reward, str) else reward["name"]
        message = rf"train_dataset: sample 2: answer must be a number, got 'cat' \(reward {name}\)"
        with pytest.raises(ValueError, match=message):
            GRPOTrainer(tiny.text_model(), [reward], args, rows, processing_class=tiny.tokenizer())


def test_functions_get_prompts_images_sizes_columns_and_state(tmp_path):
    seen = {}

    def spy(
        prompts, completions, completion_ids, images, image_sizes, resized_sizes, answer, trainer_state, **kwargs
    ):  # fmt: skip
        seen.update(locals(), step=trainer_state.global_step)
        return [0.0] * len(prompts)

    args = GRPOConfig(
        output_dir=str(tmp_path),
        num_generations=2,
        per_device_train_batch_size=6,
        max_completion_length=3,
        max_steps=1,
        shuffle_dataset=False,
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    data = [{**row, "level": i} for i, row in enumerate(tiny.rows(3, "mixed"))]
    trainer = GRPOTrainer(tiny.vlm(), [spy, {"name": "numeric", "weight": 2}], args, data, processing_class=tiny.processor())
    trainer.train()
    assert seen["prompts"] == [data[i]["prompt"] for i in (0, 0, 1, 1, 2, 2)]
    assert seen["answer"] == ["0", "0", "1", "1", "2", "2"]
    assert seen["kwargs"] == {"level": [0, 0, 1, 1, 2, 2], "think_opened": [False] * 6}
    assert [len(images) for images in seen["images"]] == [0, 0, 1, 1, 2, 2]
    assert seen["images"][5][1].tobytes() == data[2]["images"][1].tobytes()
    assert seen["image_sizes"] == [[image.size for image in images] for images in seen["images"]]
    processor = tiny.processor().image_processor
    for images, sizes in zip(seen["images"], seen["resized_sizes"], strict=True):
        grids = processor(images=images, return_tensors="pt")["image_grid_thw"].tolist() if images else []
        assert sizes == [(width * 14, height * 14) for _, height, width in grids]
    assert seen["step"] == 0
    for ids, completion in zip(seen["completion_ids"], seen["completions"], strict=True):
        assert 1 <= len(ids) <= 3
        assert tiny.tokenizer().decode(ids, skip_special_tokens=True) == completion[0]["content"]
    log = trainer.state.log_history[0]
    assert 0 < log["rewards/numeric/unparsed"] <= 1
    assert log["rewards/spy/failed"] == 0
    assert log["rewards/spy/time"] > 0


def test_a_nan_of_one_completion_is_skipped_in_training(tmp_path):
    def nan(completions, **kwargs):
        return [math.nan if index == 0 else float(index) for index in range(len(completions))]

    args = GRPOConfig(
        output_dir=str(tmp_path), num_generations=4, per_device_train_batch_size=4, max_completion_length=3, max_steps=1,
        save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    rows = tiny.rows(2, "none")
    with pytest.raises(
        ValueError, match=r"reward nan must return finite numbers or None, got nan for completion 0 of sample \d"
    ):
        GRPOTrainer(tiny.text_model(), [nan], args, rows, processing_class=tiny.tokenizer()).train()
    trainer = GRPOTrainer(tiny.text_model(), [{"name": nan, "on_error": "skip"}], args, rows, processing_class=tiny.tokenizer())
    trainer.train()
    log = trainer.state.log_history[0]
    assert (log["reward"], log["rewards/nan/failed"]) == (2.0, 0.25)


@pytest.mark.parametrize("opens", [False, True])
def test_the_format_where_the_template_opens_think(tmp_path, opens, monkeypatch):
    """The same completions have the format if the template ends with <think>, and lack it if it does not."""
    tokenizer = tiny.tokenizer()
    if opens:
        tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n", "assistant\n<think>\n")
    tokenizer.add_tokens(["<think>"])
    model = tiny.text_model()
    model.resize_token_embeddings(len(tokenizer))
    monkeypatch.setattr(score, "decode_completions", lambda tokenizer, ids: ["It is one.</think><answer>1</answer>"] * len(ids))
    args = GRPOConfig(
        output_dir=str(tmp_path), num_generations=2, per_device_train_batch_size=2, max_completion_length=3, max_steps=1,
        save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    trainer = GRPOTrainer(model, ["think_answer_format"], args, tiny.rows(2, "none"), processing_class=tokenizer)
    trainer.train()
    assert trainer.state.log_history[0]["reward"] == float(opens)
