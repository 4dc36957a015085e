"""Packed attention by the package flash-attn. https://github.com/Dao-AILab/flash-attention"""

import torch

from vlmkernels.backend import installed
from vlmkernels.ops.checks import dtype_name
from vlmkernels.ops.varlen_attention.sdpa_varlen import empty_result


def unsupported(query: torch.Tensor) -> str | None:
    # flash-attn-4 has its modules in the same package.
    if not installed("flash_attn") or not installed("flash_attn.flash_attn_interface"):
        return "flash-attn is not installed"
    if query.device.type != "cuda":
        return f"supports CUDA tensors, got {query.device.type}"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"supports bfloat16 and float16, got {dtype_name(query.dtype)}"
    if query.shape[-1] > 256:
        return f"supports head dimensions up to 256, got {query.shape[-1]}"
    return None


def run(query, key, value, cu_seqlens, max_seqlen, causal, scale):
    from flash_attn import flash_attn_varlen_func

    if not len(query):
        return empty_result(query, key, value)
    most = int(cu_seqlens.diff().max()) if max_seqlen is None else max_seqlen
    return flash_attn_varlen_func(query, key, value, cu_seqlens, cu_seqlens, most, most, softmax_scale=scale, causal=causal)
