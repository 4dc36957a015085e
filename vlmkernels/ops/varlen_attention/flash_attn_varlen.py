"""Packed attention by the package flash-attn. https://github.com/Dao-AILab/flash-attention"""

import functools
from typing import Any

import torch

from vlmkernels.ops.checks import unless_half_on_cuda
from vlmkernels.ops.varlen_attention.sdpa_varlen import empty_result


@functools.cache
def _function() -> Any:
    """Return flash_attn_varlen_func, or the error that importing it raised: the package is often built for another torch.

    flash-attn-4 has its modules in the same package, so that the package alone does not show that flash-attn is installed.
    """
    try:
        from flash_attn.flash_attn_interface import flash_attn_varlen_func

        return flash_attn_varlen_func
    except (ImportError, OSError, RuntimeError) as error:
        return error


def unsupported(query: torch.Tensor) -> str | None:
    if reason := unless_half_on_cuda(query):
        return reason
    if query.shape[-1] > 256:
        return f"supports head dimensions up to 256, got {query.shape[-1]}"
    if isinstance(_function(), Exception):
        return f"flash-attn did not load ({_function()})"
    return None


def run(query, key, value, cu_seqlens, max_seqlen, causal, scale):
    if not len(query):
        return empty_result(query, key, value)
    most = int(cu_seqlens.diff().max()) if max_seqlen is None else max_seqlen
    return _function()(query, key, value, cu_seqlens, cu_seqlens, most, most, softmax_scale=scale, causal=causal)
