"""Packed attention by ``torch.nn.attention.varlen``, the flash attention that torch ships for CUDA."""

import torch

from vlmkernels.backend import installed
from vlmkernels.ops.checks import unless_half_on_cuda
from vlmkernels.ops.varlen_attention.sdpa_varlen import empty_result


def unsupported(query: torch.Tensor) -> str | None:
    if not installed("torch.nn.attention.varlen"):
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    return unless_half_on_cuda(query)


def run(query, key, value, cu_seqlens, max_seqlen, causal, scale):
    from torch.nn.attention.varlen import varlen_attn

    if not len(query):
        return empty_result(query, key, value)
    most = int(cu_seqlens.diff().max()) if max_seqlen is None else max_seqlen
    if key.shape[1] != query.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    window = (-1, 0) if causal else (-1, -1)
    return varlen_attn(query, key, value, cu_seqlens, cu_seqlens, most, most, scale=scale, window_size=window)
