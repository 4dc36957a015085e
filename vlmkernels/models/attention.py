"""Packed attention inside transformers' models: registered under a name, no code of theirs changed."""

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlmkernels.models.decode import GroupCache
from vlmkernels.models.encode import use_image_features
from vlmkernels.ops.group_attention import GroupLayout, group_attention
from vlmkernels.ops.varlen_attention import varlen_attention

# Vision towers hand on cu_seqlens, instead of cutting the sequence themselves, to implementations with "flash" in their name.
VARLEN = "vlmkernels_flash_varlen"
GROUP = "vlmkernels_group"


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (1, H, N, D)
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """(1, N, H, D), as transformers' attention functions return it."""
    if dropout:
        raise NotImplementedError(f"{VARLEN} has no dropout, got {dropout}")
    packed = [x.squeeze(0).transpose(0, 1) for x in (query, key, value)]
    cu_seqlens = cu_seq_lens_q.to(torch.int32)
    out = varlen_attention(*packed, cu_seqlens, max_seqlen=max_length_q, causal=is_causal, scale=scaling)
    return out.unsqueeze(0), None


AttentionInterface.register(VARLEN, _attention)


def use_varlen_vision(model: PreTrainedModel) -> PreTrainedModel:
    """Let the vision tower of ``model`` attend within its images and windows by ``varlen_attention``.

    Instead of one attention call per image or window and layer: Qwen2-VL to Qwen3-VL, GLM-4V, whose towers pack patches.
    Equal up to rounding. Changed in place and returned.
    """
    model.set_attn_implementation({"vision_config": VARLEN})
    return model


def _group_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (1, Hq, T, D)
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    group_layout: GroupLayout | None = None,
    group_cache: GroupCache | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """(1, T, Hq, D). Without ``group_layout`` and ``group_cache``, keywords of the model's forward pass, it is "sdpa".

    With both the pack is of prompts, whose keys and values the cache takes; with ``group_cache`` alone there is a token of each
    completion that it holds.
    """
    if group_layout is None and group_cache is not None:
        return group_cache.attend(module.layer_idx, query, key, value, scaling), None
    if group_layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if dropout or attention_mask is not None or kwargs.get("sliding_window") is not None:
        given = {"dropout": dropout, "attention_mask": attention_mask, "sliding_window": kwargs.get("sliding_window")}
        raise NotImplementedError(f"{GROUP} takes group_layout alone, got {given} in {type(module).__name__}")
    if group_cache is not None:
        group_cache.fill(module.layer_idx, key, value)
    packed = [x.squeeze(0).transpose(0, 1) for x in (query, key, value)]
    return group_attention(*packed, group_layout, scale=scaling).unsqueeze(0), None


AttentionInterface.register(GROUP, _group_attention)
AttentionMaskInterface.register(GROUP, sdpa_mask)  # none where nothing is padding


def use_group_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Let ``model`` take packs of ``vlmkernels.models.group``, and image features as ``vlmkernels.models.encode`` makes them;
    without the keywords of these it is as before. Changed in place and returned.
    """
    text = model.config.get_text_config()
    name = next((name for name in model.config.sub_configs if getattr(model.config, name) is text), None)
    model.set_attn_implementation(GROUP if name is None else {name: GROUP})
    return use_image_features(model)
