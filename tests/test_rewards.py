"""Reward functions: the built-in ones, how they are found and called, and what is said about wrong ones."""

import functools
import math

import pytest
import tiny
import torch

from vlmkernels.train import GRPOConfig, GRPOTrainer
from vlmkernels.train.rewards import BUILT_IN, Rewards, resolve
from vlmkernels.train.rewards.text import cer, exact_match

torch.set_num_threads(1)


def message(text):
    return [{"role": "assistant", "content": text}]


def test_exact_match():
    assert exact_match(["12", " 12\n", "121", "", message("12")], answer=["12", "12", "12", "12", 12]) == [1, 1, 0, 0, 1]


def test_cer():
    completions = ["12", "13", "1", "", "1234567", message("kitten"), ""]
    scores = cer(completions, answer=["12", "12", "12", "12", "12", "sitting", ""])
    assert scores == pytest.approx([1, 0.5, 0.5, 0, 0, 1 - 3 / 7, 1])


def half(completions, **kwargs):
    return [None if c == "skip" else 0.5 for c in completions]


def test_scores_of_every_kind():
    ones = lambda completions, **kwargs: torch.ones(len(completions))  # noqa: E731
    ones.__name__ = "ones"
    flags = lambda completions, **kwargs: [c == "a" for c in completions]  # noqa: E731
    flags.__name__ = "flags"
    rewards = Rewards([half, ones, flags])
    assert rewards.names == ["half", "ones", "flags"]
    scores = rewards(2, completions=["a", "skip"])
    assert scores.dtype == torch.float32
    assert scores[0].tolist() == [0.5, 1, 1]
    assert math.isnan(scores[1, 0])
    assert scores[1, 1:].tolist() == [1, 0]


def test_found_by_name_and_by_import_path():
    assert resolve("cer") is BUILT_IN["cer"]
    assert resolve("vlmkernels.train.rewards.text:exact_match") is exact_match
    assert resolve(half) is half
    assert Rewards(functools.partial(half, extra=1)).names == ["half"]
    with pytest.raises(ValueError, match=r"reward must be one of cer, exact_match or an import path .*, got 'bleu'"):
        resolve("bleu")
    with pytest.raises(ValueError, match="reward must be importable, got 'nowhere:f': No module named 'nowhere'"):
        resolve("nowhere:f")
    with pytest.raises(ValueError, match=r"reward must be importable, got 'math:f': .* no attribute 'f'"):
        resolve("math:f")
    with pytest.raises(TypeError, match="reward must be a function or its name, got Linear"):
        resolve(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="reward_funcs must have distinct __name__s, got cer, cer"):
        Rewards(["cer", "vlmkernels.train.rewards.text:cer"])
    with pytest.raises(ValueError, match="reward_funcs must name at least one function, got none"):
        Rewards([])

    async def later(**kwargs):
        return []

    with pytest.raises(TypeError, match="reward later must be an ordinary function, got a coroutine function"):
        resolve(later)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], "reward wrong must return one number per completion, 2, got 1"),
        (3.0, "reward wrong must return a list of 2 numbers, got 3.0"),
        ([1.0, "high"], "reward wrong must return finite numbers or None, got 'high' for completion 1"),
        ([math.nan, 1.0], "reward wrong must return finite numbers or None, got nan for completion 0"),
        ([1.0, math.inf], "reward wrong must return finite numbers or None, got inf for completion 1"),
        ([[1.0], 1.0], r"reward wrong must return finite numbers or None, got \[1.0\] for completion 0"),
        (None, "reward wrong must return a list of 2 numbers, got None"),
    ],
    ids=str,
)
def test_wrong_values(value, message):
    def wrong(**kwargs):
        return value

    with pytest.raises(ValueError, match=message):
        Rewards(wrong)(2)


def test_missing_column_is_named_before_a_step_is_taken(tmp_path):
    rows = [{"prompt": row["prompt"]} for row in tiny.rows(4, "none")]
    args = GRPOConfig(output_dir=str(tmp_path), num_generations=2, per_device_train_batch_size=2)
    with pytest.raises(ValueError, match="train_dataset must have a column 'answer', which reward cer needs, got prompt"):
        GRPOTrainer(tiny.text_model(), ["cer"], args, rows, processing_class=tiny.tokenizer())


def test_functions_get_prompts_images_columns_and_state(tmp_path):
    seen = {}

    def spy(prompts, completions, completion_ids, images, answer, trainer_state, **kwargs):
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
    )
    data = [{**row, "level": i} for i, row in enumerate(tiny.rows(3, "mixed"))]
    GRPOTrainer(tiny.vlm(), spy, args, data, processing_class=tiny.processor()).train()
    assert seen["prompts"] == [data[i]["prompt"] for i in (0, 0, 1, 1, 2, 2)]
    assert seen["answer"] == ["0", "0", "1", "1", "2", "2"]
    assert seen["kwargs"] == {"level": [0, 0, 1, 1, 2, 2]}
    assert [len(images) for images in seen["images"]] == [0, 0, 1, 1, 2, 2]
    assert seen["images"][5][1].tobytes() == data[2]["images"][1].tobytes()
    assert seen["step"] == 0
    for ids, completion in zip(seen["completion_ids"], seen["completions"], strict=True):
        assert 1 <= len(ids) <= 3
        assert tiny.tokenizer().decode(ids, skip_special_tokens=True) == completion[0]["content"]
