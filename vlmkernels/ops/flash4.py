"""FlashAttention-4, the package flash-attn-4: what the attention ops share. https://github.com/Dao-AILab/flash-attention

Its kernels are compiled on first use, in about 2 seconds each, for a dtype and a head dimension, not for lengths.
"""

import functools
from typing import Any

import torch

from vlmkernels.ops.checks import unless_half_on_cuda

# The head dimensions that were tested. For 8, 16, 72 and 80 the gradient of the queries of packed sequences is wrong: a kernel
# accumulates it with heads padded to multiples of 16, and the kernel that reads it expects multiples of 32 (4.0.0b36).
WIDTHS = (64, 96, 128, 256)
CAPABILITY = (9, 0)


@functools.cache
def module() -> Any:
    """Return the module with the kernels, or the error that importing it raised. An older flash-attn does not have it."""
    try:
        import flash_attn.cute.interface

        return flash_attn.cute.interface
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        return error


def unsupported(query: torch.Tensor) -> str | None:
    """Return why the kernels do not support ``query`` (N, Hq, D), apart from its head dimension, or its device."""
    if reason := unless_half_on_cuda(query):
        return reason
    if torch.version.hip is not None:
        return "supports NVIDIA GPUs only"
    found = torch.cuda.get_device_capability(query.device)
    if found != CAPABILITY:
        return f"was tested on compute capability {CAPABILITY[0]}.{CAPABILITY[1]} only, got {found[0]}.{found[1]}"
    if isinstance(module(), Exception):
        return f"flash-attn-4 did not load ({module()})"
    return None
