"""The rows of ``linear_logps`` from hidden states and weight, without logits: the implementation of ``chunk_bytes=0``.

It has no gradients. It is the default only where it was measured to be no slower than a GEMM and a kernel for its rows; see
docs/head.md. Its one implementation is in Triton.
"""

import torch

from vlmkernels.backend import why_not

# (compute capability, dtype of the operands): the number of rows from which on it is no slower.
FASTER_FROM: dict[tuple[tuple[int, int] | None, torch.dtype], int] = {((9, 0), torch.bfloat16): 2048}


def is_faster(hidden: torch.Tensor, num: int, backend: str) -> bool:
    """Whether ``num`` rows of ``hidden`` are computed without logits by default."""
    if torch.compiler.is_compiling():  # what follows cannot be traced
        return False
    if backend not in ("auto", "triton"):
        return False
    capability = torch.cuda.get_device_capability(hidden.device) if hidden.device.type == "cuda" else None
    least = FASTER_FROM.get((capability, hidden.dtype))
    return least is not None and num >= least and why_not("linear_logps_fused", "triton", hidden) is None
