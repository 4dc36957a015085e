"""Packed attention by ``torch.nn.attention.varlen``, the flash attention that torch ships for CUDA."""

import importlib.util

import torch

from vlmkernels.ops.varlen_attention.sdpa_varlen import of_no_tokens


def unsupported(query: torch.Tensor) -> str | None:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    if query.device.type != "cuda":
        return f"takes cuda tensors, got {query.device.type}"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16, float16, got {str(query.dtype).removeprefix('torch.')}"
    return None


def run(query, key, value, cu_seqlens, max_seqlen, causal, scale):
    from torch.nn.attention.varlen import varlen_attn

    if not len(query):
        return of_no_tokens(query, key, value)
    most = int(cu_seqlens.diff().max()) if max_seqlen is None else max_seqlen
    if key.shape[1] != query.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    window = (-1, 0) if causal else (-1, -1)
    return varlen_attn(query, key, value, cu_seqlens, cu_seqlens, most, most, scale=scale, window_size=window)
