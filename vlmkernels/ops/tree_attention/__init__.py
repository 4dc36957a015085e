"""Causal attention of trees of segments. Imports only torch: backends load on first use."""

import torch

from vlmkernels.backend import choose, load, resolve
from vlmkernels.ops.checks import dtype_name, require_heads, require_tensor
from vlmkernels.ops.fixed_matmul import is_fixed
from vlmkernels.ops.tree_attention import flash4
from vlmkernels.ops.tree_attention.layout import TreeLayout

__all__ = ["TreeLayout", "tree_attention"]


def chosen_backend(query: torch.Tensor, layout: TreeLayout, window: int | None = None, backend: str = "auto") -> str:
    """Return the name of the backend that serves a call of ``tree_attention``."""
    name = resolve("tree_attention", backend)
    if is_fixed():
        return "paths" if name == "auto" else name
    if name == "auto" and flash4.is_faster(query, layout, window):
        name = "flash4"
    return choose("tree_attention", name, query, layout=layout, window=window)


def tree_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: TreeLayout,
    *,
    window: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Compute attention over a pack of trees, in which a token sees the tokens of its path from the root up to itself.

    Equivalent to::

        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        mask = layout.mask(window)
        scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True).transpose(0, 1)

    without an (N, N) matrix. It computes ``layout.num_pairs()`` scores, for a prefix of P tokens and G completions of C tokens
    P² / 2 + G C (P + C / 2), and needs memory proportional to N.

    Args:
        query: (N, Hq, D) with N = layout.num_tokens, floating point.
        key, value: (N, Hkv, D) in the dtype of ``query``; Hkv divides Hq.
        layout: the segments and their parents, see ``TreeLayout``.
        window: sliding window. A token does not see tokens of its path that are ``window`` or more tokens before it; >= 1.
            Default: no window.
        scale: multiplies the scores; > 0. Default 1 / sqrt(D).
        backend: one of

            - "flash" (CUDA, bf16 and fp16): flash attention over all segments and, for each level of the trees, from
              descendants to their ancestor, merged by their log-sum-exp. With a window that is shorter than a path, each
              segment attends to itself and a copy of up to ``window`` - 1 keys of its ancestors.
            - "flash4" (compute capability 9.0, bf16 and fp16, head dimensions of 64, 96, 128 and 256): the same with
              FlashAttention-4, the package flash-attn-4, without windows that are shorter than a path.
            - "parts" (CPU): the same as "flash" with torch's flash attention for the CPU, with windows and bidirectional spans.
            - "flex": FlexAttention with a block mask.
            - "paths": products of fixed sizes over the keys of each path. The result of a token does not depend on other
              tokens than those that it sees, bit for bit. Used by "auto" within ``fixed_rows``.
            - "auto": "parts" on the CPU. On CUDA "flash4" if it supports the tensors and the pack is so large that a training
              step is faster, else "flash" if it supports the tensors, else "flex". "flex" on other devices.

    Returns:
        (N, Hq, D) in the dtype of ``query``. Query, key and value get exact gradients: the backward pass of each part uses the
        merged output and log-sum-exp.

    Raises:
        ValueError, TypeError: a shape, dtype or device is wrong, ``window`` is less than 1, ``scale`` is not positive, or
            ``backend`` is unknown.
        NotImplementedError: no backend, or not the named one, supports these tensors.

    Source: merging by the log-sum-exp, https://arxiv.org/abs/2402.05099.
    """
    if not isinstance(layout, TreeLayout):
        raise TypeError(f"layout must be a TreeLayout, got {type(layout).__name__}")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require_tensor(name, tensor)
    if not query.is_floating_point():
        raise TypeError(f"query must be floating point, got {dtype_name(query.dtype)}")
    num = query.shape[:1].numel()
    if num != layout.num_tokens:
        raise ValueError(f"query must hold the {layout.num_tokens} tokens of layout, got {num}")
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"window must be None or an integer >= 1, got {window}")
    require_heads(query, key, value)
    if value.shape[-1] != query.shape[-1] or key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"key and value must have the width {query.shape[-1]} of query, got {key.shape[-1]}, {value.shape[-1]}"
        )
    if scale is not None and scale <= 0:
        raise ValueError(f"scale must be > 0, got {scale}")
    if window is not None and window >= layout.longest_path:
        window = None  # it hides nothing
    attention = load("tree_attention", chosen_backend(query, layout, window, backend))
    if not num:
        return query + (key.sum() + value.sum())  # empty, and a function of all three inputs for their gradients
    out: torch.Tensor = attention.run(query, key, value, layout, window, query.shape[-1] ** -0.5 if scale is None else scale)
    return out
