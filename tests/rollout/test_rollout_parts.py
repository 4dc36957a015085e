"""Parts of rollouts that are joined again score as the whole rollout does."""

from dataclasses import fields, replace

import pytest
import torch
from support import tiny
from support.groups import PAD
from support.trajectories import setting

from vlmkernels.data.samples import encode, read_sample
from vlmkernels.models.attention import undo_tree_attention, use_tree_attention
from vlmkernels.models.families import family_of
from vlmkernels.models.image_features import encode_images, use_image_features
from vlmkernels.models.masked_images import BLACK, mask_images, uniform_pixels
from vlmkernels.models.router_replay import RoutedExperts
from vlmkernels.models.trajectories import Turns
from vlmkernels.rollout import base
from vlmkernels.rollout.base import Rollout

PLAIN_PAD = tiny.tokenizer().pad_token_id
LENGTHS = [3, 1, 2, 5, 1]
GROUP = [0, 0, 1, 2, 2]


def rollout_of(prompts, group, lengths, pad=PAD, turns=None):
    """Completions with random tokens, log-probabilities and experts."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(30, mask.shape, generator=generator).masked_fill(~mask, pad)
    logps = torch.randn(mask.shape, generator=generator).masked_fill(~mask, 0)
    masks = prompts.inputs["attention_mask"].bool(), mask
    experts = [torch.randint(4, (*m.shape, 2, 1), generator=generator).short().where(m[..., None, None], -1) for m in masks]
    truncated = torch.tensor(lengths) > 2
    return Rollout(prompts, torch.tensor(group), ids, mask, truncated, logps, -logps, turns, RoutedExperts(*experts), 2 * logps)


def plain(features):
    samples = [read_sample(row, index) for index, row in enumerate(tiny.rows(3, "mixed"))]
    model = tiny.vlm()
    prompts = encode(samples, tiny.processor(), family_of(model.config))
    if features:
        prompts = encode_images(use_image_features(model), prompts)
    return model, rollout_of(prompts, GROUP, LENGTHS, PLAIN_PAD), PLAIN_PAD


def of_turns(name):
    model, prompts, group, results = setting(name)
    trajectories = [[part for k, result in enumerate(rs) for part in ([1 + k] * (k + 1), result)] + [[7] * 2] for rs in results]
    turns = Turns.from_parts(trajectories, prompts.family, "cpu", PAD)
    lengths = [sum(turns.lengths[segment] for segment in segments) for segments in turns.members]
    return model, rollout_of(prompts, group, lengths, turns=turns), PAD


CASES = {
    "pixels": lambda: plain(False),
    "features": lambda: plain(True),
    "turns": lambda: of_turns("qwen2_5_vl"),
    "turns of a recurrent model": lambda: of_turns("qwen3_5"),
}


def masked(features):
    """A rollout with masked prompts. Its experts are left out, because there are none for masked images."""
    model, whole, pad = plain(False)
    black = uniform_pixels(tiny.processor(), BLACK, {"image"})
    whole = replace(whole, routed_experts=None, masked_prompts=mask_images(whole.prompts, black))
    return model, whole.with_image_features(use_image_features(model)) if features else whole, pad


def assert_equal(one, other):
    assert one.inputs.keys() == other.inputs.keys()
    for name, value in one.inputs.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, other.inputs[name], rtol=0, atol=0, msg=name)
    assert torch.equal(one.rows, other.rows)
    assert torch.equal(one.targets, other.targets)


def test_every_field_has_parts():
    """A new field of rollouts must be a row of one of the tables, or be handled by ``select`` and ``join``."""
    handled = {*base._PADDING, *base._OF_PROMPTS, "group", "truncated", "turns", "routed_experts"}
    assert {field.name for field in fields(Rollout)} == handled


@pytest.mark.parametrize("case", CASES)
def test_joined_parts_score_as_the_whole(case):
    model, whole, pad = CASES[case]()
    first = int((whole.group == 0).sum())
    indices = torch.arange(len(whole.group))
    parts = [whole.select(indices[:first]), whole.select(indices[first:])]
    joined = Rollout.join(parts, pad)
    for name in ("group", "completion_ids", "completion_mask", "truncated", "logps", "log_kept_mass", "sampling_logps"):
        assert torch.equal(getattr(joined, name), getattr(whole, name)), name
    assert torch.equal(joined.sampled_mask, whole.sampled_mask)
    use_tree_attention(model)
    try:
        for chosen in (indices, indices[first - 1 :], indices[:1]):
            assert_equal(joined.padded(chosen), whole.padded(chosen))
            assert_equal(joined.packed(chosen, model), whole.packed(chosen, model))
        assert_equal(parts[1].packed(indices[: len(indices) - first], model), whole.packed(indices[first:], model))
    finally:
        undo_tree_attention(model)


@pytest.mark.parametrize("features", [False, True])
def test_joined_parts_have_the_masked_prompts_of_the_whole(features):
    model, whole, pad = masked(features)
    first = int((whole.group == 0).sum())
    indices = torch.arange(len(whole.group))
    joined = Rollout.join([whole.select(indices[:first]), whole.select(indices[first:])], pad)
    use_tree_attention(model)
    try:
        for shared in (None, model):
            chosen = indices[first - 1 :]
            assert_equal(*(some.branches(chosen, shared, some.sampled_mask[chosen]) for some in (joined, whole)))
    finally:
        undo_tree_attention(model)


def test_parts_without_equal_fields_are_refused():
    _, whole, pad = plain(False)
    other = Rollout(**{**vars(whole), "logps": None})
    with pytest.raises(ValueError, match="rollouts must all have logps or none, got 1 of 2 without"):
        Rollout.join([whole, other], pad)
