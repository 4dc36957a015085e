"""Packed attention inside transformers' models: registered under a name, no code of theirs changed."""

import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlmkernels.models.group_cache import GroupCache
from vlmkernels.models.image_features import use_image_features
from vlmkernels.ops.group_attention import GroupLayout, group_attention
from vlmkernels.ops.varlen_attention import varlen_attention

NAME = "vlmkernels"
# Vision towers hand on cu_seqlens, instead of cutting the sequence themselves, to implementations with "flash" in their name.
VARLEN = "vlmkernels_flash_varlen"


def _refuse(module: torch.nn.Module, **settings: object) -> None:
    if given := {name: x for name, x in settings.items() if x is not None}:
        raise NotImplementedError(f"{NAME} takes packed sequences without these, got {given} in {type(module).__name__}")


def _is_causal(module: torch.nn.Module, given: bool | None) -> bool:
    """As transformers' functions read it."""
    return getattr(module, "is_causal", True) if given is None else given


def _cast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """As autocast casts the inputs of "sdpa": rotary positions leave queries and keys, not values, in fp32 under it."""
    device = tensors[0].device.type
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors) if torch.is_autocast_enabled(device) else tensors


def _varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (1, Hq, N, D)
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # says what cu_seq_lens_q does
    *,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """(1, N, Hq, D), as transformers' attention functions return it."""
    if cu_seq_lens_q is None:
        found = f"{type(module).__name__} of transformers {transformers.__version__} gives none"
        raise NotImplementedError(f"{VARLEN} needs cu_seq_lens_q, of a tower that packs patches: {found}")
    _refuse(module, dropout=dropout or None, sliding_window=kwargs.get("sliding_window"), softcap=kwargs.get("softcap"))
    packed = [x.squeeze(0).transpose(0, 1) for x in _cast(query, key, value)]
    cu_seqlens, causal = cu_seq_lens_q.to(torch.int32), _is_causal(module, is_causal)
    out = varlen_attention(*packed, cu_seqlens, max_seqlen=max_length_q, causal=causal, scale=scaling)
    return out.unsqueeze(0), None


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (B, Hq, T, D); B = 1 of what is packed
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    group_layout: GroupLayout | None = None,
    group_cache: GroupCache | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """(B, T, Hq, D). In causal layers keywords of the model's forward pass choose:

    - ``group_layout``: packs of ``vlmkernels.models.group``. With ``group_cache`` the pack is of prompts, whose keys and values
      the cache takes; with ``group_cache`` alone there is a token of each completion that it holds;
    - ``cu_seq_lens_q``, of transformers' FlashAttentionKwargs: packed sequences.

    Otherwise, and in vision towers, which are handed the language model's keywords too, it is "sdpa" with its masks.
    """
    settings = {"scaling": scaling, "dropout": dropout, **kwargs}
    causal = _is_causal(module, is_causal)
    if not causal or (group_layout is None and group_cache is None and cu_seq_lens_q is None):
        return sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=is_causal, **settings)
    query, key, value = _cast(query, key, value)
    if group_layout is None and group_cache is not None:
        return group_cache.attend(module.layer_idx, query, key, value, scaling), None
    if group_layout is None:
        return _varlen_attention(module, query, key, value, attention_mask, cu_seq_lens_q=cu_seq_lens_q, **settings)
    _refuse(module, dropout=dropout or None, sliding_window=kwargs.get("sliding_window"), attention_mask=attention_mask)
    if group_cache is not None:
        group_cache.fill(module.layer_idx, key, value)
    packed = [x.squeeze(0).transpose(0, 1) for x in (query, key, value)]
    return group_attention(*packed, group_layout, scale=scaling).unsqueeze(0), None


AttentionInterface.register(VARLEN, _varlen_attention)
AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # none where nothing is padding


def use_varlen_vision(model: PreTrainedModel) -> PreTrainedModel:
    """Let the vision tower of ``model`` attend within its images and windows by ``varlen_attention``.

    Instead of one attention call per image or window and layer, or a mask: Qwen2-VL to Qwen3-VL, GLM-4V and, with transformers
    5.20 or newer, Pixtral, whose towers pack patches; others raise NotImplementedError in their forward pass. Equal up to
    rounding. Changed in place and returned.
    """
    model.set_attn_implementation({"vision_config": VARLEN})
    return model


def use_group_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Let ``model`` take packs of ``vlmkernels.models.group``, and image features as ``vlmkernels.models.image_features`` makes them;
    without the keywords of these it is as before. Changed in place and returned.
    """
    text = model.config.get_text_config()
    name = next((name for name in model.config.sub_configs if getattr(model.config, name) is text), None)
    model.set_attn_implementation(NAME if name is None else {name: NAME})
    return use_image_features(model)
