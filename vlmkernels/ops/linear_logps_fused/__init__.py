"""The rows of ``linear_logps`` straight from hidden states and weight, with no logits: what ``chunk_bytes=0`` asks for.

Without gradients only, and taken unasked only where it was measured to be faster than a GEMM and a kernel for its rows;
docs/head.md says how it is measured. Its one implementation is Triton's.
"""

import torch

from vlmkernels.backend import why_not

# (compute capability, dtype of the operands): the number of rows from which on it is faster, as "linear_logps, no gradient" of
# bench/bench_linear.py finds. Empty: measured nowhere yet.
FASTER_FROM: dict[tuple[tuple[int, int] | None, torch.dtype], int] = {}


def is_faster(hidden: torch.Tensor, num: int, backend: str) -> bool:
    """Whether ``num`` rows of ``hidden`` are best served without logits, where the caller leaves that open."""
    if torch.compiler.is_compiling():  # what follows cannot be traced
        return False
    if backend not in ("auto", "triton"):
        return False
    capability = torch.cuda.get_device_capability(hidden.device) if hidden.device.type == "cuda" else None
    least = FASTER_FROM.get((capability, hidden.dtype))
    return least is not None and num >= least and why_not("linear_logps_fused", "triton", hidden) is None
