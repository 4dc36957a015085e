"""Attention over packed sequences. A choice among libraries' kernels: this package has none of its own for it."""

import torch

from vlmkernels.ops.checks import require, require_dtype, require_heads
from vlmkernels.ops.implementations import Implementations

IMPLEMENTATIONS = Implementations(
    "varlen_attention",
    {"flash_attn": "flash_attn_varlen", "torch": "torch_varlen", "sdpa": "sdpa_varlen"},
    {"cuda": ("flash_attn", "torch", "sdpa")},
    otherwise=("sdpa",),
)


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    max_seqlen: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    implementation: str = "auto",
) -> torch.Tensor:
    """Attention within each of the sequences that lie one after another.

    Equivalent, with s running over the sequences, to::

        q, k, v = (x[cu_seqlens[s] : cu_seqlens[s + 1]].transpose(0, 1) for x in (query, key, value))
        out = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True).transpose(0, 1)

    Args:
        query: (N, Hq, D), fp32, bf16 or fp16.
        key, value: (N, Hkv, D) in the dtype of ``query``; Hkv divides Hq.
        cu_seqlens: (S + 1,) int32: sequence s is [cu_seqlens[s], cu_seqlens[s + 1]), as in flash-attn.
        max_seqlen: the longest sequence's length, which flash kernels need on the host: without it they wait for the device.
        causal: a token attends to itself and those before it alone.
        scale: of the scores; default 1 / sqrt(D).
        implementation: "flash_attn" (the package), "torch" (torch.nn.attention.varlen), "sdpa" (all sequences of one length in
            one call of scaled_dot_product_attention; on a GPU it waits for the lengths), or "auto".

    Returns:
        (N, Hq, D) in the dtype of ``query``. Gradients go to query, key and value.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device; NotImplementedError: nothing serves these tensors.

    Source: https://arxiv.org/abs/2307.08691.
    """
    require_heads(query, key, value)
    require_dtype("cu_seqlens", cu_seqlens, torch.int32)
    require(cu_seqlens.dim() == 1 and len(cu_seqlens) > 0, "cu_seqlens", "be (S + 1,), from 0 to N", tuple(cu_seqlens.shape))
    run = IMPLEMENTATIONS.load(IMPLEMENTATIONS.choose(implementation, query)).run
    return run(query, key, value, cu_seqlens, max_seqlen, causal, query.shape[-1] ** -0.5 if scale is None else scale)
