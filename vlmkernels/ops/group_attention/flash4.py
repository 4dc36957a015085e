"""Group attention on Hopper and Blackwell GPUs by FlashAttention-4 (the package flash-attn-4), in the calls of flash.py.

Its kernels are compiled on first use, in seconds, for a dtype and a head dimension, not for lengths. For head dimensions of 8
and 16 the gradient of the queries was wrong (version 4.0.0b36 on an H200), so head dimensions below 64 are not supported.
"""

import functools

import torch

from vlmkernels.ops.group_attention import flash


@functools.cache
def _module():
    """The module of the kernels, or the error of importing it: it is a part of the package flash_attn, which may be older."""
    try:
        import flash_attn.cute.interface

        return flash_attn.cute.interface
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        return error


def unsupported(query: torch.Tensor) -> str | None:
    found = torch.cuda.get_device_capability(query.device) if query.device.type == "cuda" else None
    if reason := flash.unsupported_operands(query, 256 if found == (9, 0) else 128, (9, 0), smallest=64):
        return reason
    if found not in ((9, 0), (10, 0), (10, 3)):
        return f"supports compute capability 9.0, 10.0 and 10.3, got {found[0]}.{found[1]}"
    if isinstance(_module(), Exception):
        return f"flash-attn-4 did not load ({_module()})"
    return None


def _forward(query, key, value, queries: flash.Sequences, keys: flash.Sequences, causal: bool, scale: float):
    out, lse, *_ = _module()._flash_attn_fwd(
        query,
        key,
        value,
        cu_seqlens_q=queries.bounds,
        cu_seqlens_k=keys.bounds,
        max_seqlen_q=queries.longest,
        max_seqlen_k=keys.longest,
        softmax_scale=scale,
        causal=causal,
        return_lse=True,
    )
    return out, lse


def _backward(dout, query, key, value, out, lse, queries: flash.Sequences, keys: flash.Sequences, causal: bool, scale: float):
    return _module()._flash_attn_bwd(
        query,
        key,
        value,
        out,
        dout,
        lse,
        scale,
        causal,
        cu_seqlens_q=queries.bounds,
        cu_seqlens_k=keys.bounds,
        max_seqlen_q=queries.longest,
        max_seqlen_k=keys.longest,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


KERNELS = flash.Kernels(_forward, _backward)


def run(query, key, value, layout, scale):
    return flash.attend(query, key, value, layout, scale, KERNELS)
