"""Packed attention by the package flash-attn. https://github.com/Dao-AILab/flash-attention"""

import importlib.util

import torch

from vlmkernels.ops.varlen_attention.sdpa_varlen import of_no_tokens


def unsupported(query: torch.Tensor) -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    if query.device.type != "cuda":
        return f"takes cuda tensors, got {query.device.type}"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16, float16, got {str(query.dtype).removeprefix('torch.')}"
    if query.shape[-1] > 256:
        return f"takes heads of at most 256, got {query.shape[-1]}"
    return None


def run(query, key, value, cu_seqlens, max_seqlen, causal, scale):
    from flash_attn import flash_attn_varlen_func

    if not len(query):
        return of_no_tokens(query, key, value)
    most = int(cu_seqlens.diff().max()) if max_seqlen is None else max_seqlen
    return flash_attn_varlen_func(query, key, value, cu_seqlens, cu_seqlens, most, most, softmax_scale=scale, causal=causal)
