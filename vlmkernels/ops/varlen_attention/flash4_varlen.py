"""Packed attention by FlashAttention-4. Heads are padded to a dimension for which its gradients are right."""

import torch
from torch.nn.functional import pad

from vlmkernels.ops import flash4
from vlmkernels.ops.varlen_attention.sdpa_varlen import empty_result


def unsupported(query: torch.Tensor) -> str | None:
    if query.shape[-1] > max(flash4.WIDTHS):
        return f"supports head dimensions up to {max(flash4.WIDTHS)}, got {query.shape[-1]}"
    return flash4.unsupported(query)


def run(query, key, value, cu_seqlens, max_seqlen, causal, scale):
    if not len(query):
        return empty_result(query, key, value)
    width = query.shape[-1]
    padding = min(x for x in flash4.WIDTHS if x >= width) - width
    if padding:
        query, key, value = (pad(x, (0, padding)) for x in (query, key, value))
    most = int(cu_seqlens.diff().max()) if max_seqlen is None else max_seqlen
    deterministic = torch.are_deterministic_algorithms_enabled()
    lengths = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": most, "max_seqlen_k": most}
    out, _ = flash4.module().flash_attn_varlen_func(
        query, key, value, **lengths, softmax_scale=scale, causal=causal, deterministic=deterministic
    )
    return out[..., :width] if padding else out
