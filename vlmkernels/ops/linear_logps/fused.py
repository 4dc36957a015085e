"""Whether ``linear_logps`` uses the kernel without logits (chunk_bytes=0) by default.

It does where this kernel was measured to be at least as fast as a GEMM and a kernel that reads its logits; see docs/head.md.
"""

import torch

from vlmkernels.backend import why_not

# (compute capability, dtype of the operands) -> the smallest number of rows for which the kernel is at least as fast.
FASTER_FROM: dict[tuple[tuple[int, int] | None, torch.dtype], int] = {((9, 0), torch.bfloat16): 2048}


def is_faster(hidden: torch.Tensor, num: int, backend: str) -> bool:
    """Return whether ``num`` results from ``hidden`` are computed without logits by default."""
    if torch.compiler.is_compiling():  # torch.compile cannot trace the rest
        return False
    if backend not in ("auto", "triton"):
        return False
    capability = torch.cuda.get_device_capability(hidden.device) if hidden.device.type == "cuda" else None
    least = FASTER_FROM.get((capability, hidden.dtype))
    return least is not None and num >= least and why_not("linear_logps_fused", "triton", hidden) is None
