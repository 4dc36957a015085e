"""Group attention on Hopper GPUs by FlashAttention-4, the package flash-attn-4, in the calls of flash.py.

Its kernels are compiled on first use, in about 2 seconds each, for a dtype and a head dimension, not for lengths.
"""

import functools

import torch

from vlmkernels.backend import why_not
from vlmkernels.ops.group_attention import flash
from vlmkernels.ops.group_attention.layout import GroupLayout

# The head dimensions that were tested. For 8, 16, 72 and 80 the gradient of the queries of packed sequences is wrong: a kernel
# accumulates it with heads padded to multiples of 16, and the kernel that reads it expects multiples of 32 (4.0.0b36).
WIDTHS = (64, 96, 128, 256)
# Compute capability -> the FLOPs of a forward pass from which a training step is faster than with flash.py. With less work the
# kernels finish before Python has launched the next ones: a call takes twice as long to launch. See docs/shared-prefix.md.
FASTER_FROM = {(9, 0): 1.2e11}


@functools.cache
def _module():
    """Return the module with the kernels, or the error that importing it raised. An older flash-attn does not have it."""
    try:
        import flash_attn.cute.interface

        return flash_attn.cute.interface
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        return error


def unsupported(query: torch.Tensor) -> str | None:
    if reason := flash.unsupported_operands(query, max(WIDTHS), (9, 0)):
        return reason
    if query.shape[-1] not in WIDTHS:
        return f"supports head dimensions of {', '.join(map(str, WIDTHS))}, got {query.shape[-1]}"
    found = torch.cuda.get_device_capability(query.device)
    if found != (9, 0):
        return f"was tested on compute capability 9.0 only, got {found[0]}.{found[1]}"
    if isinstance(_module(), Exception):
        return f"flash-attn-4 did not load ({_module()})"
    return None


def is_faster(query: torch.Tensor, layout: GroupLayout) -> bool:
    """Return whether "auto" selects this backend instead of "flash"."""
    if query.device.type != "cuda" or torch.compiler.is_compiling():
        return False
    least = FASTER_FROM.get(torch.cuda.get_device_capability(query.device))
    if least is None or 4 * layout.num_pairs * query.shape[1] * query.shape[2] < least:
        return False
    return why_not("group_attention", "flash4", query) is None


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
