"""Packed attention by FlashAttention-4, the package flash-attn-4. https://github.com/Dao-AILab/flash-attention"""

from vlmkernels.ops.group_attention.flash4 import unsupported
from vlmkernels.ops.varlen_attention.sdpa_varlen import empty_result

__all__ = ["run", "unsupported"]


def run(query, key, value, cu_seqlens, max_seqlen, causal, scale):
    from flash_attn.cute import flash_attn_varlen_func

    if not len(query):
        return empty_result(query, key, value)
    most = int(cu_seqlens.diff().max()) if max_seqlen is None else max_seqlen
    lengths = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": most, "max_seqlen_k": most}
    return flash_attn_varlen_func(query, key, value, **lengths, softmax_scale=scale, causal=causal)[0]
