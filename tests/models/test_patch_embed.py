"""Pixels into a folded patch embedding, against normalised patches into the model as it is."""

import copy

import pytest
import torch
from support import tiny
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vlmkernels.models.patch_embed import fold_patch_embed, unfold_patch_embed

NORMALISATION = {"mean": OPENAI_CLIP_MEAN, "std": OPENAI_CLIP_STD}


def qwen3_vl():
    """Whose patch embedding has a bias."""
    torch.manual_seed(0)
    text = {**tiny.TEXT, "head_dim": 8, "vocab_size": 60}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32, "patch_size": 16,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    }  # fmt: skip
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision)).eval()


MODELS = {"qwen2.5-vl": tiny.vlm, "qwen3-vl": qwen3_vl}


def patches(model, dtype, still=True):
    """Pixels of an image of 4 x 8 patches, (N, 3, Tp, P, P), and what the processor makes of them."""
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
def test_equals_normalised_patches(name, still):
    model = MODELS[name]()
    pixels, normalised = patches(model, torch.float32, still)
    parameters = dict(model.named_parameters())
    embed = model.model.visual.patch_embed
    with torch.no_grad():
        expected, features = embed(normalised), encode(model, normalised)
        fold_patch_embed(model, **NORMALISATION)
        results = [embed(pixels.flatten(1))]
        if still:
            results.append(embed(pixels[:, :, 0].flatten(1)))  # the second frame is not stored
        for result in results:
            assert (result - expected).abs().max() <= 1e-5 * expected.abs().max()
        torch.testing.assert_close(encode(model, pixels.flatten(1)), features, rtol=1e-3, atol=1e-4)
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(torch.equal(p, parameters[n]) for n, p in model.named_parameters())
    unfold_patch_embed(model)
    assert torch.equal(embed(normalised), expected)


@pytest.mark.parametrize("name", MODELS)
def test_stills_alone(name):
    """Rows of one frame are pixels; what the processor makes goes in as ever, bit by bit."""
    model = MODELS[name]()
    pixels, normalised = patches(model, torch.float32)
    with torch.no_grad():
        expected = encode(model, normalised)
        fold_patch_embed(model, **NORMALISATION, stills_only=True)
        assert torch.equal(encode(model, normalised), expected)
        torch.testing.assert_close(encode(model, pixels[:, :, 0].flatten(1)), expected, rtol=1e-3, atol=1e-4)
    model.model.visual.patch_embed.proj.kernel_size = (1, 14, 14)
    with pytest.raises(NotImplementedError, match=r"model must have rows of more than one frame, .* got \[1\]"):
        fold_patch_embed(model, **NORMALISATION, stills_only=True)


@pytest.mark.parametrize("name", MODELS)
def test_bf16_is_as_exact_as_unfolded(name):
    exact_model, model = MODELS[name]().double(), MODELS[name]().bfloat16()
    exact_model.load_state_dict(model.state_dict())
    pixels, normalised = patches(model, torch.float64)
    with torch.no_grad():
        exact = exact_model.model.visual.patch_embed(normalised)
        unfolded = model.model.visual.patch_embed(normalised.bfloat16())
        folded = fold_patch_embed(model, **NORMALISATION).model.visual.patch_embed(pixels[:, :, 0].flatten(1))
    error, allowed = ((x.double() - exact).abs().max() for x in (folded, unfolded))
    assert error <= 2 * allowed


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_the_original_parameter(name):
    model = MODELS[name]()
    folded = fold_patch_embed(copy.deepcopy(model), **NORMALISATION)
    pixels, normalised = patches(model, torch.float32)
    gradients = []
    for m, rows in ((model, normalised), (folded, pixels[:, :, 0].flatten(1))):
        proj = m.model.visual.patch_embed.proj
        encode(m, rows).square().sum().backward()
        gradients.append([p.grad for p in proj.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4 * gradients[0][0].abs().max().item())


def test_bad_input():
    model = fold_patch_embed(tiny.vlm(), **NORMALISATION)
    with pytest.raises(ValueError, match=r"pixel_values must have rows of 1176 or 588 pixels, got \(8, 100\)"):
        model.model.visual.patch_embed(torch.zeros(8, 100))
    with pytest.raises(ValueError, match=r"std must not be 0, got \(1, 0, 1\)"):
        fold_patch_embed(model, mean=(0, 0, 0), std=(1, 0, 1))
    with pytest.raises(ValueError, match="mean must have a value for each of 3 channels, got"):
        fold_patch_embed(model, mean=(0, 0), std=(1, 1, 1))
    with pytest.raises(NotImplementedError, match=r"model must have a vision tower whose patch_embed.proj is a Conv3d"):
        fold_patch_embed(tiny.text_model(), **NORMALISATION)
