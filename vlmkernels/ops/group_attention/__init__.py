"""Causal attention of groups that share a prefix. Torch only: implementations load on first use."""

import torch

from vlmkernels.ops.checks import require, require_heads
from vlmkernels.ops.group_attention.layout import GroupLayout
from vlmkernels.ops.implementations import Implementations

__all__ = ["GroupLayout", "group_attention"]

IMPLEMENTATIONS = Implementations(
    "group_attention",
    {"parts": "parts", "flash": "flash", "cudnn": "cudnn", "flex": "flex"},
    {"cpu": ("parts",), "cuda": ("flash", "flex")},
    otherwise=("flex",),
)


def group_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: GroupLayout,
    *,
    scale: float | None = None,
    implementation: str = "auto",
) -> torch.Tensor:
    """Attention of a pack of groups: a completion sees its group's prefix and itself, never another completion.

    Equivalent to::

        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        scaled_dot_product_attention(q, k, v, attn_mask=layout.mask(), scale=scale, enable_gqa=True).transpose(0, 1)

    without an (N, N) matrix: for a prefix of P tokens and G completions of C the scores are P² / 2 + G C (P + C / 2), and
    memory grows like P + G C.

    Args:
        query: (N, Hq, D), N = layout.num_tokens, floating point.
        key, value: (N, Hkv, D) in the dtype of ``query``; Hkv divides Hq.
        layout: see ``GroupLayout``.
        scale: of the scores; default 1 / sqrt(D).
        implementation: "flash" (CUDA, bf16 and fp16: flash attention of all segments, and of each group's completions on its
            prefix, merged by their log-sum-exp), "parts" (the same on the CPU), "cudnn" (the same by cuDNN's attention, on
            compute capability 9.0 and higher, for head dimensions up to 128), "flex" (FlexAttention with a block mask) or
            "auto": "parts" on the CPU, "flash" on CUDA where it is supported, "flex" otherwise. "cudnn" is by name alone, as it
            first builds plans for the shapes of its calls: see docs/shared-prefix.md.

    Returns:
        (N, Hq, D) in the dtype of ``query``. Gradients go to query, key and value, exact: the backward pass of each part takes
        the merged result.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device; NotImplementedError: nothing serves these tensors.

    Source: merging by the log-sum-exp, https://arxiv.org/abs/2402.05099.
    """
    num = layout.num_tokens
    require(query.shape[:1].numel() == num, "query", f"hold the {num} tokens of layout", query.shape[:1].numel())
    require_heads(query, key, value)
    run = IMPLEMENTATIONS.load(IMPLEMENTATIONS.choose(implementation, query)).run
    if not num:
        return query + (key.sum() + value.sum())  # empty, and gradients still reach all three
    return run(query, key, value, layout, query.shape[-1] ** -0.5 if scale is None else scale)
