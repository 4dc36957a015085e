"""Causal attention of groups that share a prefix. Imports only torch: backends load on first use."""

import torch

from vlmkernels.backend import choose, load, resolve
from vlmkernels.ops.checks import require_heads
from vlmkernels.ops.group_attention import flash4
from vlmkernels.ops.group_attention.layout import GroupLayout

__all__ = ["GroupLayout", "group_attention"]


def chosen_backend(query: torch.Tensor, layout: GroupLayout, backend: str = "auto") -> str:
    """Return the name of the backend that serves a call of ``group_attention``."""
    name = resolve("group_attention", backend)
    return choose("group_attention", "flash4" if name == "auto" and flash4.is_faster(query, layout) else name, query)


def group_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: GroupLayout,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Compute attention over a pack of groups, where a completion sees the prefix of its group and itself.

    Equivalent to::

        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        scaled_dot_product_attention(q, k, v, attn_mask=layout.mask(), scale=scale, enable_gqa=True).transpose(0, 1)

    without an (N, N) matrix. For a prefix of P tokens and G completions of C tokens, it computes P² / 2 + G C (P + C / 2)
    scores and needs memory proportional to P + G C.

    Args:
        query: (N, Hq, D) with N = layout.num_tokens, floating point.
        key, value: (N, Hkv, D) in the dtype of ``query``; Hkv divides Hq.
        layout: the lengths of prefixes and completions, see ``GroupLayout``.
        scale: multiplies the scores. Default 1 / sqrt(D).
        backend: one of

            - "flash" (CUDA, bf16 and fp16): flash attention over all segments and from each group's completions to its prefix,
              merged by their log-sum-exp.
            - "flash4" (compute capability 9.0, bf16 and fp16, head dimensions of 64, 96, 128 and 256): the same with
              FlashAttention-4, the package flash-attn-4.
            - "parts" (CPU): the same with torch's flash attention for the CPU.
            - "flex": FlexAttention with a block mask.
            - "auto": "parts" on the CPU. On CUDA "flash4" if it supports the tensors and the pack is so large that a training
              step is faster, else "flash" if it supports the tensors, else "flex". "flex" on other devices.

    Returns:
        (N, Hq, D) in the dtype of ``query``. Query, key and value get exact gradients: the backward pass of each part uses the
        merged output and log-sum-exp.

    Raises:
        ValueError, TypeError: a shape, dtype or device is wrong, or ``backend`` is unknown.
        NotImplementedError: no backend, or not the named one, supports these tensors.

    Source: merging by the log-sum-exp, https://arxiv.org/abs/2402.05099.
    """
    num = query.shape[:1].numel()
    if num != layout.num_tokens:
        raise ValueError(f"query must hold the {layout.num_tokens} tokens of layout, got {num}")
    require_heads(query, key, value)
    attention = load("group_attention", chosen_backend(query, layout, backend))
    if not num:
        return query + (key.sum() + value.sum())  # empty, and a function of all three inputs for their gradients
    out: torch.Tensor = attention.run(query, key, value, layout, query.shape[-1] ** -0.5 if scale is None else scale)
    return out
