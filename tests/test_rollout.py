"""Sampling behind a cache that each prompt fills once, against ``generate`` on copies of the prompts."""

import pytest
import tiny
import torch
from test_group import prompts_of

from vlmkernels.train import GRPOConfig
from vlmkernels.train.rollout import Generate


@pytest.mark.parametrize("images", [(1, 1), (2, 0, 1), (0, 0)])
@pytest.mark.parametrize(("build", "temperature"), [(tiny.vlm, 0), (tiny.vlm, 1.0), (tiny.qwen2_vl, 1.0), (tiny.qwen3_vl, 1.0)])
def test_same_tokens_as_copies_of_the_prompt(tmp_path, monkeypatch, images, build, temperature):
    model = build()
    prompts = prompts_of(images, model)
    args = GRPOConfig(output_dir=str(tmp_path), max_completion_length=12, use_cpu=True)
    generate = Generate(model, tiny.processor(), args)
    rollouts, filled = [], []
    visual = model.model.visual.forward
    monkeypatch.setattr(model.model.visual, "forward", lambda *a, **k: filled.append(len(a[0])) or visual(*a, **k))
    for copies in (False, True):
        if copies:
            monkeypatch.setattr(generate, "_prefilled", lambda m, p, n: p.repeat(n).inputs)
        filled.clear()
        torch.manual_seed(0)
        rollouts.append((generate(model, prompts, 4, temperature), sum(filled)))
    (ours, patches), (theirs, all_patches) = rollouts
    assert torch.equal(ours.completion_ids, theirs.completion_ids)
    assert torch.equal(ours.completion_mask, theirs.completion_mask)
    assert all_patches == 4 * patches
    assert patches > 0 or not any(images)


def test_text_model(tmp_path):
    model = tiny.text_model()
    args = GRPOConfig(output_dir=str(tmp_path), max_completion_length=12, use_cpu=True)
    generate = Generate(model, tiny.tokenizer(), args)
    prompts = prompts_of((0, 0), model)
    rollout = generate(model, prompts, 3, 0)
    inputs = prompts.repeat(3).inputs
    expected = model.generate(**inputs, generation_config=generate._config(0))[:, inputs["input_ids"].shape[1] :]
    width = rollout.completion_ids.shape[1]
    mask = rollout.completion_mask
    assert torch.equal(rollout.completion_ids[mask], expected[:, :width][mask])


def test_models_that_cannot_share_fill_each_copy(tmp_path):
    model = tiny.text_model()
    model.config.layer_types = ["full_attention", "sliding_attention"]
    args = GRPOConfig(output_dir=str(tmp_path), max_completion_length=4, use_cpu=True)
    generate = Generate(model, tiny.tokenizer(), args)
    prompts = prompts_of((0, 0), model)
    inputs = generate._prefilled(model, prompts, 3)
    assert "past_key_values" not in inputs
    assert torch.equal(inputs["input_ids"], prompts.inputs["input_ids"].repeat_interleave(3, 0))
