"""PrefixGrouper: one forward pass for each prompt with all of its completions. https://github.com/johncaged/PrefixGrouper

Its attention calls a function of its user twice: with the prompts, and with the completions whose keys include the prompt. The
function here is PyTorch's attention on the CPU; the rest is the tutorial in the README of the project, with the registration of
the attention that the project has for transformers.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from prefix_grouper import PrefixGrouper as Grouper
from prefix_grouper.utils.register_transformers import register_attention
from transformers import AttentionInterface

from vlmkernels.conformance import Adapter, Sample, pad
from vlmkernels.conformance.models import prompt_text

ATTENTION = "conformance_padded_attention"


def padded_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Causal attention with a mask (B, K) of the keys; the queries are those of the last keys, as in FlashAttention 2."""
    groups = query.shape[1] // key.shape[1]
    causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
    allowed = causal & attention_mask[:, None, None]
    allowed = allowed | ~allowed.any(-1, keepdim=True)  # a row of padding attends to something, so that it is not NaN
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, allowed, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, padded_attention)
register_attention()


class PrefixGrouper(Adapter):
    name = "prefix-grouper"
    packages = ("prefix_grouper", "transformers")
    dtypes = (torch.float32, torch.bfloat16)
    models = ("text", "qwen2_5_vl")

    def logps(self, model: Any, processor: Any, samples: Sequence[Sample], temperature: float) -> list[torch.Tensor]:
        groups = [[*group] for _, group in itertools.groupby(samples, lambda sample: (sample.text, sample.images))]
        prompts = processed(processor, [group[0] for group in groups])
        attention_mask = prompts["attention_mask"]
        completions = [torch.tensor(sample.completion_ids, dtype=torch.int64) for sample in samples]
        ids, mask = pad(completions), pad([torch.ones_like(row) for row in completions])
        grouper = Grouper.from_ungrouped_masks(attention_mask, mask, [len(group) for group in groups])
        position_ids = positions(model, prompts, grouper)
        inputs = grouper.concat_input(prompts["input_ids"], attention_mask, ids, mask)
        images = {name: value for name, value in prompts.items() if name in ("pixel_values", "image_grid_thw")}
        with attention(model):
            logits = model(
                inputs,
                position_ids=position_ids,
                use_cache=False,
                **images,
                prefix_grouper=grouper,
                prefix_grouper_attn_func=ATTENTION,
            ).logits
        _, _, output, output_mask = grouper.split_output(logits, include_prefix_last=1)
        ids = grouper.convert_padding(ids, mask, padding_mode="right")
        output, output_mask = output[:, :-1] / temperature, output_mask[:, 1:]
        logps = output.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - output.logsumexp(-1)
        return [row[where] for row, where in zip(logps, output_mask, strict=True)]


def processed(processor: Any, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Return the inputs of the model for the prompts."""
    images = [picture for sample in samples for picture in sample.pictures]
    given = {"images": images} if images else {}
    return dict(
        processor(text=[prompt_text(processor, sample) for sample in samples], padding=True, return_tensors="pt", **given)
    )


def positions(model: Any, prompts: dict[str, torch.Tensor], grouper: Grouper) -> torch.Tensor:
    """Return the positions as the README describes them: those of each completion continue those of the prompt."""
    if "image_grid_thw" in prompts:
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        of_prompts, _ = model.model.get_rope_index(**{name: prompts[name] for name in names if name in prompts})
    else:
        of_prompts = (prompts["attention_mask"].cumsum(-1) - 1)[None]
    rows = []
    for index, info in enumerate(grouper.group_info):
        prompt = of_prompts[:, index, prompts["attention_mask"][index].bool()]
        following = prompt.max() + 1
        parts = [(following + torch.arange(size)).expand(len(prompt), -1) for size in info.suffix_lens]
        rows.append(torch.cat([prompt, *parts], 1).T)
    out = pad(rows).permute(2, 0, 1)
    return out if "image_grid_thw" in prompts else out[0]


@contextlib.contextmanager
def attention(model: Any) -> Iterator[None]:
    """Let the text model use the attention of the project."""
    config = model.config.get_text_config()
    before, config._attn_implementation = config._attn_implementation, "prefix_grouper_attention"
    try:
        yield
    finally:
        config._attn_implementation = before
