"""Pixels in a folded patch embedding, compared with normalized patches in the original model."""

import copy

import pytest
import torch
from support import tiny
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vlmkernels.models.patch_embed import fold_patch_embed, unfold_patch_embed

NORMALIZATION = {"mean": OPENAI_CLIP_MEAN, "std": OPENAI_CLIP_STD}


MODELS = {"qwen2.5-vl": tiny.vlm, "qwen3-vl": tiny.qwen3_vl_large_patches}


def patches(model, dtype, still=True):
    """Return the pixels of an image of 4 x 8 patches, (N, 3, Tp, P, P), and the processor's output for them."""
    shape = model.model.visual.patch_embed.proj.weight.shape[1:]
    pixels = torch.randint(0, 256, (32, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    if still:
        pixels[:, :, 1] = pixels[:, :, 0]
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1, 1) for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return pixels, (((pixels.double() / 255) - mean) / std).flatten(1).to(dtype)


def encode(model, rows):
    return model.get_image_features(rows, image_grid_thw=torch.tensor([[1, 4, 8]])).pooler_output[0]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("still", [True, False])
def test_equals_normalized_patches(name, still):
    model = MODELS[name]()
    pixels, normalized = patches(model, torch.float32, still)
    parameters = dict(model.named_parameters())
    embed = model.model.visual.patch_embed
    with torch.no_grad():
        expected, features = embed(normalized), encode(model, normalized)
        fold_patch_embed(model, **NORMALIZATION)
        results = [embed(pixels.flatten(1))]
        if still:
            results.append(embed(pixels[:, :, 0].flatten(1)))  # the second frame is not stored
        for result in results:
            assert (result - expected).abs().max() <= 1e-5 * expected.abs().max()
        torch.testing.assert_close(encode(model, pixels.flatten(1)), features, rtol=1e-3, atol=1e-4)
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(torch.equal(p, parameters[n]) for n, p in model.named_parameters())
    unfold_patch_embed(model)
    assert torch.equal(embed(normalized), expected)


@pytest.mark.parametrize("name", MODELS)
def test_stills_only(name):
    """Rows of one frame are pixels; results for the processor's own output stay bitwise equal."""
    model = MODELS[name]()
    pixels, normalized = patches(model, torch.float32)
    with torch.no_grad():
        expected = encode(model, normalized)
        fold_patch_embed(model, **NORMALIZATION, stills_only=True)
        assert torch.equal(encode(model, normalized), expected)
        torch.testing.assert_close(encode(model, pixels[:, :, 0].flatten(1)), expected, rtol=1e-3, atol=1e-4)
    model.model.visual.patch_embed.proj.kernel_size = (1, 14, 14)
    with pytest.raises(NotImplementedError, match=r"model must have rows of more than one frame with stills_only, got \[1\]"):
        fold_patch_embed(model, **NORMALIZATION, stills_only=True)


@pytest.mark.parametrize("name", MODELS)
def test_bf16_is_as_accurate_as_unfolded(name):
    exact_model, model = MODELS[name]().double(), MODELS[name]().bfloat16()
    exact_model.load_state_dict(model.state_dict())
    pixels, normalized = patches(model, torch.float64)
    with torch.no_grad():
        exact = exact_model.model.visual.patch_embed(normalized)
        unfolded = model.model.visual.patch_embed(normalized.bfloat16())
        folded = fold_patch_embed(model, **NORMALIZATION).model.visual.patch_embed(pixels[:, :, 0].flatten(1))
    error, allowed = ((x.double() - exact).abs().max() for x in (folded, unfolded))
    assert error <= 2 * allowed


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_the_original_parameter(name):
    model = MODELS[name]()
    folded = fold_patch_embed(copy.deepcopy(model), **NORMALIZATION)
    pixels, normalized = patches(model, torch.float32)
    gradients = []
    for m, rows in ((model, normalized), (folded, pixels[:, :, 0].flatten(1))):
        proj = m.model.visual.patch_embed.proj
        encode(m, rows).square().sum().backward()
        gradients.append([p.grad for p in proj.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4 * gradients[0][0].abs().max().item())


def test_errors():
    model = fold_patch_embed(tiny.vlm(), **NORMALIZATION)
    with pytest.raises(ValueError, match=r"pixel_values must have rows of 1176 or 588 pixels, got \(8, 100\)"):
        model.model.visual.patch_embed(torch.zeros(8, 100))
    with pytest.raises(ValueError, match=r"std must not be 0, got \(1, 0, 1\)"):
        fold_patch_embed(model, mean=(0, 0, 0), std=(1, 0, 1))
    with pytest.raises(ValueError, match="mean must have a value for each of 3 channels, got"):
        fold_patch_embed(model, mean=(0, 0), std=(1, 1, 1))
    with pytest.raises(NotImplementedError, match=r"model must have a vision tower whose patch_embed.proj is a Conv3d"):
        fold_patch_embed(tiny.text_model(), **NORMALIZATION)
