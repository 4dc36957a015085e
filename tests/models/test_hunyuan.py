"""The outputs of HunYuan-VL for a sample do not depend on the samples before it."""

import copy
from dataclasses import replace

import pytest
import torch
from support import tiny_families
from support.groups import processed

from vlmkernels.models.hunyuan import number_images_per_sample, undo_number_images_per_sample


def positions_of(model, batch):
    return model.model.get_rope_index(**{name: x for name, x in batch.inputs.items() if name != "pixel_values"})


def test_images_are_numbered_per_sample():
    """Two images in sample 2 and one each in samples 1 and 3. The last axis numbers images."""
    model, batch = copy.deepcopy(tiny_families.case("hunyuan_vl").model), processed("hunyuan_vl")
    positions, deltas = positions_of(model, batch)
    assert positions.shape == (4, *batch.inputs["input_ids"].shape)
    assert torch.equal(deltas, torch.zeros(4, 1))
    for index in range(4):
        alone = batch.select(torch.tensor([index]))
        assert torch.equal(positions_of(model, alone)[0][:, 0], positions[:, index])
        undo_number_images_per_sample(model)
        assert torch.equal(positions_of(model, alone)[0][:, 0], positions[:, index])  # the model's own for one sample
        number_images_per_sample(model)
    assert model.model.get_rope_index.__self__ is model.model  # of the copy


def test_transformers_numbers_the_images_of_a_batch():
    """If this fails, transformers has changed, and ``number_images_per_sample`` is not needed with this version."""
    model, batch = copy.deepcopy(tiny_families.case("hunyuan_vl").model), processed("hunyuan_vl")
    inside = batch.inputs["mm_token_type_ids"] == 1
    for change, number in ((number_images_per_sample, 0), (undo_number_images_per_sample, 3)):
        numbers = positions_of(change(model), batch)[0][-1, 3, inside[3]]
        assert set(numbers[1:-1].tolist()) == {number}  # the first and the last image token have positions like text


def test_errors_and_other_models():
    model, batch = tiny_families.case("hunyuan_vl").model, processed("hunyuan_vl")
    batch = replace(batch, inputs=batch.inputs | {"image_grid_thw": batch.inputs["image_grid_thw"][1:]})
    with pytest.raises(ValueError, match="image_grid_thw must have one row per run of image tokens, 4, got 3"):
        positions_of(model, batch)
    other = tiny_families.case("ernie4_5_vl_moe").model
    assert number_images_per_sample(other) is other
    assert "get_rope_index" not in vars(other.model)
