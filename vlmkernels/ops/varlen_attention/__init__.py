"""Attention over packed sequences, by the kernels of other libraries."""

import torch

from vlmkernels.backend import resolve, select
from vlmkernels.ops.arguments import as_cu_seqlens
from vlmkernels.ops.checks import require_device, require_heads

__all__ = ["varlen_attention"]


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    max_seqlen: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Compute attention within each sequence of a pack, where sequences lie one after another.

    Equivalent, for every sequence s, to::

        q, k, v = (x[cu_seqlens[s] : cu_seqlens[s + 1]].transpose(0, 1) for x in (query, key, value))
        out = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True).transpose(0, 1)

    Args:
        query: (N, Hq, D), fp32, bf16 or fp16.
        key, value: (N, Hkv, D) in the dtype of ``query``; Hkv divides Hq.
        cu_seqlens: (S + 1,) integers: sequence s is [cu_seqlens[s], cu_seqlens[s + 1]), as in flash-attn.
        max_seqlen: the length of the longest sequence. The backends flash_attn, flash4 and torch need it on the host, and wait
            for the device if it is None.
        causal: whether a token attends only to itself and to earlier tokens of its sequence.
        scale: multiplies the scores. Default 1 / sqrt(D).
        backend: one of

            - "flash_attn": the package flash-attn.
            - "flash4" (compute capability 9.0): the package flash-attn-4. Only used by name, because it has not run on a GPU
              with padded heads.
            - "torch": torch.nn.attention.varlen.
            - "sdpa": one call of scaled_dot_product_attention for all sequences of one length. On a GPU it waits for the
              lengths.
            - "auto": the first of flash_attn, torch and sdpa that supports the tensors.

    Returns:
        (N, Hq, D) in the dtype of ``query``. Query, key and value get gradients.

    Raises:
        ValueError, TypeError: a shape, dtype or device is wrong, or ``backend`` is unknown.
        NotImplementedError: the named backend does not support these tensors.

    Source: Dao, FlashAttention-2 (https://arxiv.org/abs/2307.08691).
    """
    require_heads(query, key, value)
    cu_seqlens = as_cu_seqlens(cu_seqlens, query.device)
    require_device("cu_seqlens", cu_seqlens, query.device, "query")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"cu_seqlens must be (S + 1,), from 0 to N, got {tuple(cu_seqlens.shape)}")
    attention = select("varlen_attention", resolve("varlen_attention", backend), query)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out: torch.Tensor = attention.run(query, key, value, cu_seqlens, max_seqlen, causal, scale)
    return out
