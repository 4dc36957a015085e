"""Cutting and joining the model inputs of each family."""

import pytest
import tiny
import torch

from vlmkernels.models.families import FAMILIES, TEXT, append_completions, drop_padding, family_of, take_samples

QWEN_VL = FAMILIES[0]


def test_slicing_by_samples_keeps_each_sample_its_images():
    grid = torch.tensor([[1, 2, 2], [1, 2, 4], [1, 2, 2]])  # 4, 8 and 4 patches
    inputs = {
        "input_ids": torch.arange(12).view(3, 4),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]]),
        "pixel_values": torch.arange(16.0)[:, None],
        "image_grid_thw": grid,
    }
    num_images = torch.tensor([2, 0, 1])
    taken = take_samples(inputs, torch.tensor([2, 0, 2]), num_images, QWEN_VL)
    assert taken["pixel_values"].flatten().tolist() == [*range(12, 16), *range(12), *range(12, 16)]
    assert taken["image_grid_thw"].tolist() == grid[[2, 0, 1, 2]].tolist()
    assert "pixel_values" not in take_samples(inputs, torch.tensor([1, 1]), num_images, QWEN_VL)

    trimmed = drop_padding(taken, QWEN_VL)
    assert trimmed["input_ids"].tolist() == [[9, 10, 11], [1, 2, 3], [9, 10, 11]]
    ids, mask = torch.tensor([[5], [6], [7]]), torch.tensor([[True], [True], [False]])
    joined = append_completions(trimmed, ids, mask, QWEN_VL)
    assert joined["input_ids"][:, -1].tolist() == [5, 6, 7]
    assert joined["attention_mask"][:, -1].tolist() == [1, 1, 0]
    with pytest.raises(ValueError, match=r"model inputs of the family qwen_vl must be among .*, got 'num_tiles'"):
        take_samples({**inputs, "num_tiles": torch.ones(3)}, torch.tensor([0]), num_images, QWEN_VL)


def test_families():
    assert family_of(tiny.vlm().config) is QWEN_VL
    assert family_of(tiny.text_model().config) is TEXT
    rows = {"input_ids": torch.ones(2, 1), "attention_mask": torch.ones(2, 1), "pixel_values": torch.arange(3.0)}
    taken = take_samples(rows, torch.tensor([1]), torch.tensor([2, 1]), FAMILIES[1])
    assert taken["pixel_values"].tolist() == [2.0]
