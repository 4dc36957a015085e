"""Recurrent layers of transformers models over packs of trees: the gated delta rule and causal convolutions.

The layers GatedDeltaNet (Qwen3-Next, Qwen3.5) and ShortConv (LFM2, LFM3) call the functions ``causal_conv1d_fn`` and
``torch_chunk_gated_delta_rule`` and pass the keywords of the model's forward pass on to them. ``use_tree_layers`` replaces
both in the layers of one model (vlmkernels.models.forward_copies) by the ops ``causal_conv1d`` and ``gated_delta_rule``, whose
states fork where segments of a tree do. Without the keywords ``tree_layout`` and ``tree_cache`` they call the original
functions.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from vlmkernels.models import forward_copies
from vlmkernels.models.tree_cache import TreeCache
from vlmkernels.ops.causal_conv1d import causal_conv1d
from vlmkernels.ops.gated_delta_rule import gated_delta_rule
from vlmkernels.ops.tree_attention import TreeLayout


def use_tree_layers(decoder: torch.nn.Module) -> None:
    """Let the recurrent layers of a decoder run over packs of trees. Changes the ``forward`` of these layers."""
    for module in decoder.modules():
        if path := forward_copies.calling(type(module).forward, _REPLACED):
            names = _REPLACED.keys() & set(path[-1].__code__.co_names)
            originals = path[-1].__globals__
            functions = {name: partial(_REPLACED[name], originals[name], module.layer_idx) for name in names}
            forward_copies.replace(module, functions, __name__)


def unprepared_layer(decoder: torch.nn.Module) -> torch.nn.Module | None:
    """Return the first recurrent layer of a decoder if it is not prepared by ``use_tree_layers``, else None."""
    layers = (module for module in decoder.modules() if forward_copies.calling(type(module).forward, _REPLACED))
    first = next(layers, None)
    return None if first is None or forward_copies.is_replaced(first, __name__) else first


def unsupported(decoder: torch.nn.Module) -> str | None:
    """Return why ``use_tree_layers`` does not support a decoder, or None if it does."""
    for module in decoder.modules():
        is_recurrent = bool(forward_copies.calling(type(module).forward, _REPLACED))
        if is_recurrent and "forward" in vars(module) and not forward_copies.is_replaced(module, __name__):
            return f"the forward of its {type(module).__name__} has been replaced, for example by hooks of accelerate"
    return None


def undo_tree_layers(model: torch.nn.Module) -> None:
    """Undo ``use_tree_layers`` in all layers of ``model``."""
    forward_copies.restore(model, __name__)


def _with_states(
    layer: int,
    kind: str,
    layout: TreeLayout | None,
    cache: TreeCache | None,
    op: Callable[..., Any],
) -> torch.Tensor:
    """Call ``op(layout, initial_state=..., return_state=...)`` in a pack, in a pack of prompts, or in a decoding step."""
    if cache is None:
        return op(layout, return_state=False)
    if layout is not None and not cache.extends:
        out, states = op(layout, return_state=True)
        cache.fill_states(layer, kind, states)
        return out
    out, states = op(cache.step_layout, initial_state=cache.states(layer, kind), return_state=True)
    cache.set_states(layer, kind, states)
    return out


def _causal_conv1d(
    original: Callable[..., torch.Tensor],
    layer: int,
    hidden_states: torch.Tensor,  # (B, D, T); B = 1 for packs
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    layout, cache = kwargs.pop("tree_layout", None), kwargs.pop("tree_cache", None)
    if layout is None and cache is None:
        return original(hidden_states, weight, bias, activation, **kwargs)
    op = partial(causal_conv1d, hidden_states[0].T.to(weight.dtype), weight, bias=bias, activation=activation)
    return _with_states(layer, "conv", layout, cache, op).T.unsqueeze(0).to(hidden_states.dtype)


def _gated_delta_rule(
    original: Callable[..., Any],
    layer: int,
    query: torch.Tensor,  # (B, T, Hk, Dk); B = 1 for packs
    key: torch.Tensor,
    value: torch.Tensor,  # (B, T, Hv, Dv)
    g: torch.Tensor,
    beta: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    layout, cache = kwargs.pop("tree_layout", None), kwargs.pop("tree_cache", None)
    if layout is None and cache is None:
        return original(query, key, value, g=g, beta=beta, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, **kwargs)
    op = partial(gated_delta_rule, *(x[0] for x in (query, key, value, g, beta)), normalize=use_qk_l2norm_in_kernel)
    return _with_states(layer, "delta", layout, cache, op).unsqueeze(0), None


_REPLACED = {"causal_conv1d_fn": _causal_conv1d, "torch_chunk_gated_delta_rule": _gated_delta_rule}
