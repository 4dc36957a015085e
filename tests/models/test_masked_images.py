"""Masked images: black is what the processor makes of black pixels, in every family."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.tiny_families import BUILDERS, case

from vlmkernels.models.families import family_of
from vlmkernels.models.inputs import ModelInputs, from_rows, to_rows
from vlmkernels.models.masked_images import BLACK, GREY, exchange_images, mask_images, media_of, uniform_pixels

PIXELS = ("pixel_values", "pixel_values_videos")
WITH_MEDIA = [name for name in BUILDERS if name not in ("text", "qwen3_next")]


def batch_of(name):
    built = case(name)
    counts = (torch.tensor([len(getattr(sample, kind)) for sample in built.samples]) for kind in ("images", "videos"))
    return ModelInputs.from_processor(built.inputs(), family_of(built.model.config), *counts)


def batch_of_black_images(name, monkeypatch):
    black = SimpleNamespace(integers=lambda low, high, shape, dtype: np.zeros(shape, dtype))
    with monkeypatch.context() as patch:
        patch.setattr(np.random, "default_rng", lambda seed: black)
        return batch_of(name)


@pytest.mark.parametrize("name", WITH_MEDIA)
def test_a_mask_of_everything_is_a_black_image(name, monkeypatch):
    batch = batch_of(name)
    color = uniform_pixels(case(name).processor, BLACK, media_of(batch))
    expected, masked = batch_of_black_images(name, monkeypatch).inputs, mask_images(batch, color)
    assert masked.inputs.keys() == batch.inputs.keys()
    for key, value in masked.inputs.items():
        if key not in PIXELS:
            assert value is batch.inputs[key]
            continue
        # llava_onevision enlarges images of samples with several of them by gray edges, which are masked too.
        edges = (value == color[key]) if name == "llava_onevision" else torch.zeros_like(value, dtype=torch.bool)
        assert not ((value - expected[key]).abs() > 1e-6).logical_and(~edges).any(), key


def test_the_frames_of_a_video_may_be_stacked():
    """The inputs of Gemma 4 in transformers 5.17: (videos, frames, patches, D) instead of (frames, patches, D)."""

    def stacked(inputs):
        return {
            name: x.reshape(1, -1, *x.shape[-2:]) if "video_" in name or "videos" in name else x for name, x in inputs.items()
        }

    batch, processor = batch_of("gemma4"), case("gemma4").processor
    flat = {name: x.flatten(0, -3) for name, x in stacked(batch.inputs).items() if "video" in name and x.dim() == 4}
    stacking = SimpleNamespace(
        image_processor=processor.image_processor,
        video_processor=lambda **kwargs: stacked({**processor.video_processor(**kwargs)}),
    )
    color, same = (uniform_pixels(x, GREY, ("image", "video")) for x in (processor, stacking))
    assert all(torch.equal(color[name], same[name]) for name in PIXELS)
    masked, other = (
        mask_images(replace(batch, inputs=inputs), color, 0.6, generator=torch.Generator().manual_seed(0)).inputs
        for inputs in ({**batch.inputs, **flat}, stacked(batch.inputs))
    )
    assert not torch.equal(masked["pixel_values_videos"], flat["pixel_values_videos"])
    assert torch.equal(other["pixel_values_videos"].flatten(0, -3), masked["pixel_values_videos"])


def test_colors_are_normalized():
    processor = case("qwen2_5_vl").processor
    mean, std = (torch.tensor(x) for x in (processor.image_processor.image_mean, processor.image_processor.image_std))
    for level in (BLACK, GREY):
        color = uniform_pixels(processor, level)["pixel_values"].unflatten(0, (3, -1))
        torch.testing.assert_close(color, ((level / 255 - mean) / std).unsqueeze(1).expand_as(color))


def test_the_masked_patches_are_those_of_the_generator():
    batch, color = batch_of("qwen2_5_vl"), uniform_pixels(case("qwen2_5_vl").processor, BLACK, ("image", "video"))
    batch = replace(batch, image_keys=torch.arange(5))

    def masks(seed, ratio=0.6):
        masked = mask_images(batch, color, ratio, generator=torch.Generator().manual_seed(seed))
        changed = {name: (masked.inputs[name] != batch.inputs[name]).any(-1) for name in PIXELS}
        for name, rows in changed.items():
            assert (masked.inputs[name][rows] == color[name]).all()  # whole patches
        return masked, torch.cat([*changed.values()])

    state = torch.get_rng_state()
    masked, chosen = masks(0)
    assert 0.4 < chosen.float().mean() < 0.8
    assert torch.equal(masks(0)[1], chosen)
    assert not torch.equal(masks(1)[1], chosen)
    assert not masks(0, ratio=0.0)[1].any()
    assert masks(0, ratio=1.0)[1].all()
    assert torch.equal(torch.get_rng_state(), state)
    assert not set(masked.image_keys.tolist()) & set(batch.image_keys.tolist())
    assert torch.equal(masked.select(torch.tensor([2])).inputs["pixel_values"], masked.inputs["pixel_values"][4:20])


def test_squares_of_pixels():
    batch, color = batch_of("paligemma"), uniform_pixels(case("paligemma").processor, BLACK)
    pixels = mask_images(batch, color, 0.5, generator=torch.Generator().manual_seed(0)).inputs["pixel_values"]
    is_masked = (pixels == color["pixel_values"]).all(1).unflatten(-1, (2, 14)).unflatten(-3, (2, 14))  # 28 x 28 pixels
    assert torch.equal(is_masked.all((-3, -1)), is_masked.float().mean((-3, -1)) > 0.5)
    assert 0 < is_masked.all((-3, -1)).sum() < 16
    other = mask_images(batch, color, 0.5, generator=torch.Generator().manual_seed(0), patch_size=7).inputs["pixel_values"]
    assert not torch.equal(other, pixels)


@pytest.mark.parametrize("name", [name for name in ("qwen2_5_vl", "llava_next", "minicpmv4_7") if name in BUILDERS])
def test_samples_exchange_images_of_the_same_sizes(name):
    batch = batch_of(name)
    # Samples 1 and 4, the same text with other pixels, can exchange; 3 and 5 have the same image; nothing fits to sample 2.
    batch = batch.select(torch.tensor([0, 1, 2, 3, 1, 3]))
    pixels = batch.inputs["pixel_values"].clone()
    batch.inputs["pixel_values"] = pixels
    rows = to_rows(pixels, batch.family.spec("pixel_values"))
    counts = batch.rows[batch.family.axis("pixel_values")]
    start = int(counts[:4].sum())
    changed = rows.clone()
    changed[start : start + counts[4]] = torch.where(rows[start : start + counts[4]] != 0, 0.25, 0.0)
    batch.inputs["pixel_values"] = from_rows(changed, batch.family.spec("pixel_values"))
    other, moved = exchange_images(replace(batch, image_keys=torch.arange(int(batch.num_images.sum()))))
    assert moved.tolist() == [False, True, False, False, True, False]
    for sample, source in enumerate((0, 4, 2, 3, 1, 5)):
        now, before = (x.select(torch.tensor([k])).inputs for x, k in ((other, sample), (batch, source)))
        assert ("pixel_values" in now) == ("pixel_values" in before)
        assert torch.equal(now.get("pixel_values", torch.empty(0)), before.get("pixel_values", torch.empty(0)))
    assert all(torch.equal(x, batch.inputs[key]) for key, x in other.inputs.items() if key != "pixel_values")


def test_what_cannot_be_masked():
    batch, color = batch_of("internvl"), uniform_pixels(case("internvl").processor, BLACK)
    with pytest.raises(ValueError, match=r"ratio must be in \[0, 1\], got 1.5"):
        mask_images(batch, color, 1.5)
    with pytest.raises(ValueError, match=r"color must have a value for pixel_values \(family internvl\), got none"):
        mask_images(batch, {})
    features = replace(batch, inputs={"image_features": torch.zeros(1, 2)})
    message = r"inputs must have the pixels of their images \(family internvl\), got image_features"
    for change in (lambda: mask_images(features, color), lambda: exchange_images(features)):
        with pytest.raises(ValueError, match=message):
            change()
