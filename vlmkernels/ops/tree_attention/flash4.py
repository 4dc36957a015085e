"""Tree attention on Hopper GPUs by FlashAttention-4, in the calls of flash.py."""

import torch

from vlmkernels.backend import installed, why_not
from vlmkernels.ops import flash4
from vlmkernels.ops.tree_attention import flash
from vlmkernels.ops.tree_attention.layout import TreeLayout

# The FLOPs of a forward pass from which "auto" selects this backend. With less work the kernels wait for Python, which launches
# them more slowly than those of flash.py. Measured in training steps with 0.03 and 0.12 TFLOP (docs/shared-prefix.md).
FASTER_FROM = 1.2e11


def unsupported(query: torch.Tensor, layout: TreeLayout | None = None, window: int | None = None) -> str | None:
    if window is not None:
        return f"supports no windows that are shorter than a path, got a window of {window}"
    if query.shape[-1] not in flash4.WIDTHS:
        return f"supports head dimensions of {', '.join(map(str, flash4.WIDTHS))}, got {query.shape[-1]}"
    if not installed("triton"):
        return "triton is not installed"
    return flash4.unsupported(query)


def is_faster(query: torch.Tensor, layout: TreeLayout, window: int | None = None) -> bool:
    """Return whether "auto" selects this backend instead of "flash"."""
    if query.device.type != "cuda" or torch.compiler.is_compiling():
        return False
    is_large = 4 * layout.num_pairs(window) * query.shape[1] * query.shape[2] >= FASTER_FROM
    return is_large and why_not("tree_attention", "flash4", query, layout=layout, window=window) is None


def _forward(query, key, value, queries: flash.Sequences, keys: flash.Sequences, causal: bool, window: None, scale: float):
    out, lse, *_ = flash4.module()._flash_attn_fwd(
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


def _backward(dout, query, key, value, out, lse, queries: flash.Sequences, keys: flash.Sequences, causal, window, scale):
    return flash4.module()._flash_attn_bwd(
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


def run(query, key, value, layout, window, scale):
    return flash.attend(query, key, value, layout, window, scale, KERNELS)
