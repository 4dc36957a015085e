"""Completions after a prompt and after the prompt with masked images: in one pass as by themselves."""

import pytest
import torch
from support import tiny_families
from support.groups import SHARING, completions_of, processed

from vlmkernels.models.attention import undo_tree_attention, use_tree_attention
from vlmkernels.models.branches import branch_lengths, pack_branches, pad_branches
from vlmkernels.models.head import completion_logps, logit_arguments, output_head
from vlmkernels.models.masked_images import BLACK, has_media, mask_images, media_of, uniform_pixels

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # raised by processors with NumPy 2

# One of each layout of pixels and kind of attention; test_trees runs trees in all families.
FAMILIES = (*("text", "qwen2_5_vl", "qwen3_5", "hunyuan_vl", "llava_onevision", "idefics3", "gemma3", "paligemma", "molmo2"),)


def case_of(name):
    """The prompts of a family, the same with masked images, and two completions of each of them."""
    prompts, processor = processed(name), tiny_families.case(name).processor
    masked = prompts
    if has_media(prompts).any():
        masked = mask_images(
            prompts, uniform_pixels(processor, BLACK, media_of(prompts)), 0.6, generator=torch.Generator().manual_seed(0)
        )
    group = torch.arange(len(prompts)).repeat_interleave(2)
    ids, mask = completions_of([3 + k % 4 for k in range(len(group))])
    ids = ids + 150  # letters
    loss_mask = mask.clone()
    loss_mask[1] = False  # a completion that does not count
    return prompts, masked, group, ids, mask, loss_mask


def plain_logps(model, prompts, masked, group, ids, mask, loss_mask):
    """One sequence at a time, by the model of transformers."""
    found = []
    for inputs, chosen in ((prompts, torch.ones(len(group), dtype=torch.bool)), (masked, has_media(prompts)[group])):
        for k in chosen.nonzero()[:, 0].tolist():
            length = int(mask[k].sum())
            row = inputs.select(group[k : k + 1]).trim().append(ids[k : k + 1, :length], mask[k : k + 1, :length].long())
            logps = model(**row.inputs).logits[0, -length - 1 : -1].float().log_softmax(-1)
            found.append(logps.gather(1, ids[k, :length, None])[:, 0][loss_mask[k, :length]])
    return torch.cat(found)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name in SHARING])
def test_every_family_equals_separate_passes(name):
    model, arguments = tiny_families.case(name).model, case_of(name)
    head = output_head(model)
    options = {"head": head, "arguments": logit_arguments(model, head), "temperature": 1.0}
    with torch.no_grad():
        expected = plain_logps(model, *arguments)
        padded = completion_logps(model, pad_branches(*arguments), **options)
        use_tree_attention(model)
        try:
            pack = pack_branches(model, *arguments)
            packed = completion_logps(model, pack, **options)
        finally:
            undo_tree_attention(model)
    torch.testing.assert_close(padded, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-4)
    prompts, _, group, _, mask, loss_mask = arguments
    lengths, times = branch_lengths(prompts)
    assert pack.inputs["input_ids"].numel() == sum(lengths) + sum(
        n * times[g] for n, g in zip(mask.sum(1).tolist(), group.tolist(), strict=True)
    )
    if has_media(prompts).any():  # the masks change the predictions
        count = int(loss_mask.sum())
        originals = expected[:count][has_media(prompts)[group].repeat_interleave(loss_mask.sum(1))]
        assert (expected[count:] - originals).abs().max() > 1e-3
