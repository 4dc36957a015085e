"""The attention ops as values of ``attn_implementation`` in transformers.

In every call of an attention layer, transformers looks up the attention function by the name in the layer's configuration. The
functions below set this name; they change no weights.
"""

from functools import cache
from typing import Any

import torch
import transformers
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlmkernels.models.families import DECODERS, SPANS_BEYOND_WINDOWS, SPANS_IN_WINDOWS_ONLY, recurrent_layers
from vlmkernels.models.hooks import remove_hooks
from vlmkernels.models.image_features import use_image_features
from vlmkernels.models.linear_attention import undo_tree_layers, unprepared_layer, use_tree_layers
from vlmkernels.models.norms import undo_fused_norms, use_fused_norms
from vlmkernels.models.rotary import undo_fused_rotary, use_fused_rotary
from vlmkernels.models.tree_cache import TreeCache
from vlmkernels.ops.fixed_matmul import is_fixed
from vlmkernels.ops.tree_attention import TreeLayout, tree_attention
from vlmkernels.ops.tree_attention.paths import Recomputed, attend
from vlmkernels.ops.varlen_attention import varlen_attention

NAME = "vlmkernels"
# Vision towers pass cu_seqlens only to implementations with "flash" in their name. For others they split the sequence.
VARLEN = "vlmkernels_flash_varlen"


def use_varlen_vision(model: PreTrainedModel) -> PreTrainedModel:
    """Run the attention of the vision tower as one ``varlen_attention`` call per layer.

    This replaces a call per image or window, or a mask; results are equal up to rounding. Towers that pack patches are
    supported: Qwen2-VL to Qwen3.5-VL, GLM-4V and, with transformers >= 5.20, Pixtral. The forward pass of other towers raises
    NotImplementedError. While a model trains with attention dropout, every image or window is a call of "sdpa".

    Changes ``model`` in place: the attention implementation of its vision configuration. To undo it::

        model.set_attn_implementation({"vision_config": "sdpa"})

    Args:
        model: a transformers model with a vision tower, without adapters.

    Returns:
        ``model``.

    Raises:
        NotImplementedError: the model has no vision configuration.
    """
    if "vision_config" not in model.config.sub_configs:
        raise NotImplementedError(f"model must have a vision tower with a vision_config, got {type(model).__name__}")
    model.set_attn_implementation({"vision_config": VARLEN})
    return model


def use_tree_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Make ``model`` accept packs of trees (see ``pack_trees`` and ``pack_groups``), and image features in place of pixels.

    A pack is one sample without padding, with the keyword ``tree_layout``; ``attention_mask`` does not change the hidden states
    of a pack. Other inputs run as with "sdpa". Layers that support it use the op ``rotary`` and, on a GPU, one kernel for a
    norm (``use_fused_rotary``, ``use_fused_norms``): decoding is limited by the number of kernels, and training computes the
    same.

    Changes ``model`` in place: the attention implementation of its text configuration, hooks of ``model.base_model``, and the
    ``forward`` of recurrent layers (``vlmkernels.models.linear_attention``), of attention layers and of norms of its decoder.
    ``undo_tree_attention`` undoes all of it except the hooks of ``use_image_features``, which do nothing without its keywords.

    Args:
        model: a transformers model without adapters, for which ``prefix_sharing_unsupported`` returns None.

    Returns:
        ``model``.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers model without adapters, got {type(model).__name__}")
    _set_text_attention(model, NAME)
    use_tree_layers(model.get_decoder())
    use_fused_norms(use_fused_rotary(model.get_decoder(), where_supported=True))
    if _prepare_pack not in model.base_model._forward_pre_hooks.values():
        model.base_model.register_forward_pre_hook(_prepare_pack, with_kwargs=True)
    return use_image_features(model)


def undo_tree_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Undo ``use_tree_attention`` in ``model``, in place, and return it. Its text attention is "sdpa" afterwards."""
    _set_text_attention(model, "sdpa")
    undo_tree_layers(model)
    undo_fused_norms(undo_fused_rotary(model.get_decoder()))
    remove_hooks(model, [_prepare_pack])
    return model


def _set_text_attention(model: PreTrainedModel, implementation: str) -> None:
    text = model.config.get_text_config()
    name = next((name for name in model.config.sub_configs if getattr(model.config, name) is text), None)
    model.set_attn_implementation(implementation if name is None else {name: implementation})


@cache
def _no_mask(device: torch.device) -> torch.Tensor:
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def check_tree_attention(model: PreTrainedModel) -> None:
    """Raise NotImplementedError if ``model`` would run a pack of trees as one sequence.

    That is so before ``use_tree_attention``, and after it for a model that was saved and loaded or got another attention.
    """
    config = model.config.get_text_config()
    chosen = config._attn_implementation
    layer = unprepared_layer(model.get_decoder()) if recurrent_layers(config) else None
    if chosen != NAME or layer is not None or _prepare_pack not in model.base_model._forward_pre_hooks.values():
        found = f"attn_implementation={chosen!r}" if layer is None else f"a {type(layer).__name__} that ignores trees"
        raise NotImplementedError(f"model must be prepared by use_tree_attention to run packs, got {found}")


def _prepare_pack(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Check and prepare the keywords of a pack; a forward pre-hook.

    The attention mask is replaced by one with four axes: from another one the model would build a mask over all pairs of
    tokens. Only its loss of the router reads the original mask.
    """
    if kwargs.get("tree_layout") is None and kwargs.get("tree_cache") is None:
        return None
    check_tree_attention(module)
    for name in ("use_cache", "cache", "past_key_values"):
        if kwargs.get(name) not in (None, False):
            raise ValueError(
                f"{name} must be None or False with tree_layout: the states of a pack are not those of one sequence, got "
                f"{type(kwargs[name]).__name__} (decode_groups keeps them in a TreeCache)"
            )
    if kwargs.get("tree_layout") is not None and not kwargs["tree_layout"].num_tokens:
        raise ValueError("tree_layout must hold at least one token to run a model, got none")
    if kwargs.get("position_ids") is None:
        raise ValueError("position_ids must be given with tree_layout, as in the inputs of a pack, got None")
    return args, {**kwargs, "attention_mask": _no_mask(module.device), "use_cache": False}


def _varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (1, Hq, N, D)
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # redundant: cu_seq_lens_q has the bounds of the sequences
    *,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention over packed sequences, (1, N, Hq, D), with the signature of transformers' attention functions."""
    if cu_seq_lens_q is None:
        raise NotImplementedError(
            f"{VARLEN} needs a vision tower that packs patches and passes cu_seq_lens_q, "
            f"got {type(module).__name__} of transformers {transformers.__version__}"
        )
    if not _exceeds_window(kwargs.get("sliding_window"), cu_seq_lens_q, max_length_q):
        kwargs["sliding_window"] = None
    _check_unsupported(module, kwargs)
    causal = _is_causal(module, is_causal)
    if dropout:
        settings = {"scaling": scaling, "dropout": dropout, "is_causal": causal}
        lengths = cu_seq_lens_q.diff().tolist()
        sequences = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
        outputs = [sdpa_attention_forward(module, *sequence, attention_mask=None, **settings)[0] for sequence in sequences]
        return torch.cat(outputs, dim=1), None
    packed = [x.squeeze(0).transpose(0, 1) for x in _autocast(query, key, value)]
    cu_seqlens = cu_seq_lens_q.to(torch.int32)
    out = varlen_attention(*packed, cu_seqlens, max_seqlen=max_length_q, causal=causal, scale=scaling)
    return out.unsqueeze(0), None


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (B, Hq, T, D); B = 1 for packs
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    tree_layout: TreeLayout | None = None,
    tree_cache: TreeCache | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention, (B, T, Hq, D), with the signature of transformers' attention functions.

    In the layers of a decoder the keywords of the model's forward pass choose the op:

    - ``tree_layout``: a pack of trees. If ``tree_cache`` is given too, the pack holds prompts only, and the cache stores their
      keys and values; or it holds tokens that are appended to completions in the cache (``TreeCache.extend``).
    - ``tree_cache`` without ``tree_layout``: one decoding step, with one token for each running completion.
    - ``cu_seq_lens_q`` of transformers' FlashAttentionKwargs: packed sequences. They must not be longer than the sliding window
      of a layer that has one.

    Without these keywords, and in vision towers, which receive them too, it is "sdpa".

    Raises:
        NotImplementedError: the layer has attention sinks (GPT-OSS), which "sdpa" would ignore, or a setting that the ops do
            not support; or packed sequences would run through recurrent layers.
    """
    if kwargs.get("s_aux") is not None:
        raise NotImplementedError(f"{NAME} must run layers without attention sinks, got s_aux in {type(module).__name__}")
    settings = {"scaling": scaling, "dropout": dropout, "is_causal": is_causal, **kwargs}
    model_type = getattr(getattr(module, "config", None), "model_type", None)
    is_decoder = _is_causal(module, is_causal) or model_type in DECODERS
    if not is_decoder or (tree_layout is None and tree_cache is None and cu_seq_lens_q is None):
        count, length = query.shape[2], key.shape[2]
        if attention_mask is None and is_decoder and 1 < count < length:
            # The last tokens only (logits_to_keep, in layers of Gemma 4 with keys of other layers): sdpa would align the first.
            attention_mask = torch.ones(count, length, dtype=torch.bool, device=query.device).tril_(length - count)
        if is_decoder and is_fixed():
            return _fixed_attention(module, *_autocast(query, key, value), attention_mask, **settings), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    query, key, value = _autocast(query, key, value)
    if tree_layout is None and tree_cache is None:
        if layers := recurrent_layers(module.config):
            raise NotImplementedError(f"{NAME} must run packed sequences without recurrent layers, got {', '.join(layers)}")
        return _varlen_attention(module, query, key, value, attention_mask, cu_seq_lens_q=cu_seq_lens_q, **settings)
    window = kwargs.pop("sliding_window", None)
    _check_unsupported(module, {**kwargs, "dropout": dropout or None})
    if tree_layout is None:
        return tree_cache.attend(module.layer_idx, query, key, value, scaling, window), None
    if tree_cache is not None and not tree_cache.extends:
        tree_cache.fill(module.layer_idx, key, value)
    if window is None and model_type in SPANS_IN_WINDOWS_ONLY:
        tree_layout = tree_layout.causal()
    longest = max((stop - start for start, stop in tree_layout.bidirectional), default=0)
    if window is not None and window < longest and model_type in SPANS_BEYOND_WINDOWS:
        raise NotImplementedError(
            f"images must have at most as many tokens as the sliding window of a {model_type}, {window}, got {longest}"
        )
    if tree_cache is not None and tree_cache.extends:
        return tree_cache.attend_extension(module.layer_idx, query, key, value, scaling, tree_layout, window), None
    # Multi-head latent attention (DeepSeek) has narrower values than keys.
    narrower = query.shape[-1] - (width := value.shape[-1])
    packed = [x.squeeze(0).transpose(0, 1) for x in (query, key, pad(value, (0, narrower)) if narrower else value)]
    return tree_attention(*packed, tree_layout, window=window, scale=scaling)[..., :width].unsqueeze(0), None


def _fixed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (B, Hq, T, D)
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,  # (B or 1, 1, T, L), bool or added to the scores
    **settings: Any,
) -> torch.Tensor:
    """Attention as by "sdpa", (B, T, Hq, D), but a row depends neither on other rows nor on its padding (``fixed_rows``)."""
    count, length = query.shape[2], key.shape[2]
    if mask is None:
        seen = torch.ones(1, count, length, dtype=torch.bool).tril_(length - count)
    else:
        seen = (mask if mask.dtype == torch.bool else mask >= 0)[:, 0, :, :length].cpu()
    scale = query.shape[-1] ** -0.5 if settings["scaling"] is None else settings["scaling"]

    def forward(*tensors: torch.Tensor) -> torch.Tensor:
        rows = []
        for q, k, v, sees in zip(*(x.transpose(1, 2) for x in tensors), seen.expand(len(query), -1, -1), strict=True):
            first = int(sees.any(0).int().argmax())  # tokens before it are padding
            rows.append(attend(q, k[first:], v[first:], sees[:, first:], scale))
        return torch.stack(rows)

    def other(*tensors: torch.Tensor) -> torch.Tensor:
        return sdpa_attention_forward(module, *tensors, attention_mask=mask, **settings)[0]

    return Recomputed.apply(forward, other, query, key, value)


def _exceeds_window(window: int | None, cu_seqlens: torch.Tensor, max_length: int | None) -> bool:
    """Return whether a packed sequence is longer than a sliding window, which has no effect on the others."""
    if window is None:
        return False
    return window < (cu_seqlens.diff().max().item() if max_length is None else max_length)


def _check_unsupported(module: torch.nn.Module, settings: dict[str, object]) -> None:
    """Raise NotImplementedError for settings of an attention layer that the ops for packed sequences do not support."""
    given = {name: settings.get(name) for name in ("dropout", "sliding_window", "softcap", "attention_mask")}
    given = {name: value for name, value in given.items() if value is not None}
    if given:
        layer = type(module).__name__
        raise NotImplementedError(f"{NAME} must run packed sequences without these settings, got {given} in {layer}")


def _is_causal(module: torch.nn.Module, is_causal: bool | None) -> bool:
    """Return whether a layer is causal, by the rule of transformers' attention functions."""
    return getattr(module, "is_causal", True) if is_causal is None else is_causal


def _autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cast to the dtype of autocast, as autocast does for "sdpa". Rotary positions leave queries and keys in fp32."""
    device = tensors[0].device.type
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors) if torch.is_autocast_enabled(device) else tensors


AttentionInterface.register(VARLEN, _varlen_attention)
AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # returns no mask if there is no padding
