"""Features of equal images are computed once per forward pass, and with a frozen tower once for all passes."""

import copy
import re
from dataclasses import replace

import pytest
import torch
import transformers
from packaging.version import Version
from support import tiny, tiny_families
from support.groups import SHARING, completions_of, processed
from support.training import config, length_reward, lora, run_ours

from vlmkernels.data.samples import encode, read_sample
from vlmkernels.models.attention import use_tree_attention
from vlmkernels.models.families import family_of
from vlmkernels.models.image_features import (
    accepts_image_features,
    deduplicate_images,
    encode_images,
    feature_reuse_unsupported,
)
from vlmkernels.models.packs import pack_groups
from vlmkernels.models.positions import prompt_positions
from vlmkernels.train import GRPOTrainer
from vlmkernels.train.experience import Experience

WITH_IMAGES = [name for name in SHARING if processed(name).num_images.any()]
# The families in which the rows of pixels can be assigned to images, which the slices of MiniCPM-V cannot.
ROWS_KNOWN = [
    name
    for name in WITH_IMAGES
    if processed(name).family.axis("pixel_values") in ("image", "image_patch") and "image_slice" not in processed(name).rows
]

needs_features = pytest.mark.skipif(
    not accepts_image_features(tiny.vlm()),
    reason=f"transformers {transformers.__version__} does not accept features in place of pixels",
)


def test_models_accept_features_since_5_18():
    """The tests of this file do not run if the argument is not found, for example under another name."""
    assert accepts_image_features(tiny.vlm()) == (Version(transformers.__version__) >= Version("5.18"))


def model_of(name):
    return use_tree_attention(copy.deepcopy(tiny_families.case(name).model))


def hidden_of(model, batch, inputs):
    """Return the hidden states that predict completions of the prompts."""
    group = torch.arange(len(batch)).repeat_interleave(2)
    ids, mask = completions_of([3, 2] * len(batch), vocab=20)
    ids += tiny_families.token_id("a")
    pack = pack_groups(inputs, prompt_positions(model, batch.inputs), group, ids, mask, batch.family)
    return model.base_model(**pack.inputs, use_cache=False).last_hidden_state[0, pack.rows]


@needs_features
@pytest.mark.parametrize("name", WITH_IMAGES)
def test_features_replace_pixels(name):
    model, batch = model_of(name), processed(name)
    encoded = encode_images(model, batch)
    assert "image_features" in encoded.inputs
    assert not {"pixel_values", "image_sizes", "pixel_attention_mask"} & encoded.inputs.keys()
    for chosen in (torch.arange(len(batch)), torch.tensor([2, 0, 1, 2]), torch.tensor([0])):
        expected = hidden_of(model, batch.select(chosen), batch.select(chosen).inputs)
        actual = hidden_of(model, encoded.select(chosen), encoded.select(chosen).inputs)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert encode_images(model, encoded) is encoded


@needs_features
@pytest.mark.parametrize("name", ROWS_KNOWN)
def test_equal_images_are_encoded_once(name):
    """The gradient of an image is the sum over all samples that contain it."""
    model, batch = model_of(name), processed(name)
    keys = torch.arange(int(batch.num_images.sum())) * 7 - 3
    batch = replace(batch, image_keys=keys).select(torch.tensor([2, 1, 2, 1]))
    inputs = deduplicate_images(batch)
    if "batch_num_images" in inputs:
        assert inputs is batch.inputs  # counts the images of each sample
        return
    assert len(inputs["image_index"]) == 6
    assert 0 < len(inputs["pixel_values"]) <= len(batch.inputs["pixel_values"]) // 2
    results = []
    for given in (batch.inputs, inputs):
        model.zero_grad()
        hidden = hidden_of(model, batch, given)
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
        results.append((hidden.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (expected, gradients), (actual, ours) = results
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert ours.keys() == gradients.keys()
    size = max(g.abs().max() for g in gradients.values())
    assert all((ours[n] - g).abs().max() <= 1e-5 * size for n, g in gradients.items())


def test_image_keys_depend_on_content():
    model = tiny.vlm()
    red, blue = (tiny.image(0, 28, 28).convert("P", palette=0) for _ in range(2))
    blue.putpalette([255 - x for x in blue.getpalette()])
    images = [tiny.image(1), tiny.image(1).copy(), tiny.image(2), red, blue]
    rows = [{"prompt": [{"role": "user", "content": "?"}], "images": [image]} for image in images]
    samples = [read_sample(row, index) for index, row in enumerate(rows)]
    keys = encode(samples, tiny.processor(), family_of(model.config)).image_keys.tolist()
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4


def freeze(model):
    model.model.visual.requires_grad_(False)
    return model


def test_features_raise_in_a_model_that_ignores_them():
    """A text model, like models of transformers 5.17, does not accept features."""
    model, ids = use_tree_attention(tiny.text_model()), torch.ones(1, 2, dtype=torch.int64)
    for given in ({"image_features": torch.ones(1, 4)}, {"image_index": None}, {"idle_media": {}}):
        with pytest.raises(NotImplementedError, match=r"accept features .*transformers >= 5.18\), got Qwen2Model"):
            model(input_ids=ids, **given)


@needs_features
@pytest.mark.parametrize("adapters", [False, True])
def test_a_frozen_tower_runs_once_per_generation_batch(tmp_path, adapters):
    """The features serve sampling, the reference and two iterations of the policy; the steps equal steps without sharing."""
    options = {"beta": 0.1, "num_iterations": 2, "steps_per_generation": 2, "max_steps": 4, "fixed": False}
    if adapters:
        options["peft_config"] = lora()
    runs, seen = [], []
    for share in ("auto", False):
        torch.manual_seed(0)
        model = freeze(tiny.vlm())
        model.model.visual.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
        seen.clear()
        # Both sample from copies of the prompt, so that completions are equal.
        options["generation_kwargs"] = {"typical_p": 0.9}
        trainer, logs, _ = run_ours(
            tmp_path / f"{share}", tiny.rows(8, "one"), model=model, funcs=(length_reward,), share_prefix=share, **options
        )
        assert trainer.prepared.reuses_image_features == (share == "auto")
        runs.append((logs, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}))
        if share == "auto":
            prompts = trainer._experience.rollout.prompts
            assert "pixel_values" not in prompts.inputs
            batches = -(-options["max_steps"] * trainer.args.gradient_accumulation_steps // trainer.args.steps_per_rollout)
            assert len(seen) == 2 * batches  # once to sample from copies, once for all other passes
            state = trainer._experience.state_dict()
            again = Experience.from_state_dict(state, prompts.family, "cpu")
            assert torch.equal(again.rollout.prompts.inputs["image_features"], prompts.inputs["image_features"])
            assert torch.equal(again.rollout.prompts.image_keys, prompts.image_keys)
    (ours, parameters), (theirs, others) = runs
    for mine, other in zip(ours, theirs, strict=True):
        for key in (key for key in other if not re.search("time|_run$|per_second", key)):
            assert mine[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key
    for key, parameter in others.items():
        torch.testing.assert_close(parameters[key], parameter, rtol=1e-4, atol=1e-6)


@needs_features
def test_a_run_without_feature_reuse_resumes_from_features(tmp_path):
    """A run resumed with other options continues within the generation batch."""
    logs = []
    for share in ("auto", False):
        options = {"max_steps": 2, "num_iterations": 2, "beta": 0.1, "save_strategy": "steps", "save_steps": 1}
        args = config(tmp_path, share_prefix=share, **options)
        trainer = GRPOTrainer(freeze(tiny.vlm()), [length_reward], args, tiny.rows(4), processing_class=tiny.processor())
        assert trainer.prepared.reuses_image_features == (share == "auto")
        trainer.train(resume_from_checkpoint=None if share == "auto" else str(tmp_path / "checkpoint-1"))
        assert "image_features" in trainer._experience.rollout.prompts.inputs
        logs.append([log for log in trainer.state.log_history if "loss" in log])
    for name in ("loss", "grad_norm", "kl", "entropy"):
        assert logs[1][1][name] == pytest.approx(logs[0][1][name], rel=1e-4), name


@needs_features
def test_a_trained_tower_runs_in_each_pass(tmp_path):
    """In each pass, it encodes equal images once."""
    seen, model = [], tiny.vlm()
    model.model.visual.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    rows = [{**row, "image": tiny.image(5)} for row in tiny.rows(4, "one")]
    options = {"per_device_train_batch_size": 8, "num_generations": 4, "gradient_accumulation_steps": 1, "max_steps": 1}
    trainer, _, _ = run_ours(tmp_path, rows, model=model, fixed=False, **options)
    assert not trainer.prepared.reuses_image_features
    patches = trainer._experience.rollout.prompts.inputs["pixel_values"].shape[0]
    assert seen == [patches // 2] * 2  # two prompts, to sample and to train


@needs_features
def test_feature_reuse_unsupported():
    model = tiny.vlm()
    assert feature_reuse_unsupported(freeze(model)) is None
    model.model.visual.merger.ln_q.weight.requires_grad_(True)
    assert feature_reuse_unsupported(model) == "visual.merger.ln_q is trained"
    freeze(model).model.visual.add_module("noise", torch.nn.Dropout(0.1))
    assert feature_reuse_unsupported(model) == "visual.noise has dropout"
    del model.model.visual.noise
    model.model.visual.blocks[1].attn.attention_dropout = 0.1
    assert feature_reuse_unsupported(model) == "visual.blocks.1.attn has dropout"
    dense = tiny_families.case("llava_next").model
    assert feature_reuse_unsupported(dense) is not None
