"""Matrix products whose rows do not depend on the number of rows. Imports only torch: backends load on first use."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vlmkernels.backend import resolve, select
from vlmkernels.ops.checks import dtype_name

__all__ = ["fixed_matmul", "fixed_rows", "is_fixed"]

_state = threading.local()


@contextmanager
def fixed_rows() -> Iterator[None]:
    """In a ``with`` block on this thread, let the ops compute each row or token in a way that does not depend on the others.

    ``linear_logps`` and ``linear_grpo_loss`` compute logits with ``fixed_matmul``, and ``tree_attention`` uses its backend
    "paths". Backward passes are not affected.
    """
    _state.depth = getattr(_state, "depth", 0) + 1
    try:
        yield
    finally:
        _state.depth -= 1


def is_fixed() -> bool:
    """Return whether this thread is in a block of ``fixed_rows``."""
    return getattr(_state, "depth", 0) > 0


def fixed_matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Compute ``a @ b + bias`` such that each row of the result depends on its row of ``a`` only, bit for bit.

    Libraries choose kernels, and with them the order of sums, by the number of rows. Here the products have the same size for
    any number of rows: rows are computed in tiles, and the last one is padded.

    Args:
        a: (M, K), fp32, bf16 or fp16.
        b: (K, N) in the dtype of ``a``, such as a transposed weight. The result may depend on its strides.
        bias: (N,) in the dtype of ``a``, or None.
        out_dtype: the dtype of the result: that of ``a``, the default, or fp32.
        backend: one of

            - "tiles": one product of torch for each tile. Once for every K, N and dtype it checks that a row of a tile does not
              depend on its place in the tile, and otherwise computes single rows.
            - "triton" (CUDA): one kernel with one tile configuration, which is not tuned for the sizes. Products of fp32 are in
              fp32, not TF32.
            - "auto": "tiles" on the CPU, "triton" on CUDA.

    Returns:
        (M, N), without gradients.

    Raises:
        ValueError, TypeError: a shape, dtype or device is wrong, or ``backend`` is unknown.
        NotImplementedError: the named backend does not support these tensors.

    Source: He et al., Defeating Nondeterminism in LLM Inference
        (https://thinkingmachines.ai/blog/defeating-nondeterminism-in-llm-inference/).
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"a and b must be (M, K) and (K, N), got {tuple(a.shape)} and {tuple(b.shape)}")
    if bias is not None and tuple(bias.shape) != (b.shape[1],):
        raise ValueError(f"bias must be ({b.shape[1]},), got {tuple(bias.shape)}")
    for name, tensor in (("b", b), ("bias", bias)):
        if tensor is not None and (tensor.dtype != a.dtype or tensor.device != a.device):
            raise TypeError(
                f"{name} must be like a, {dtype_name(a.dtype)} on {a.device}, got {dtype_name(tensor.dtype)} on {tensor.device}"
            )
    if out_dtype not in (None, a.dtype, torch.float32):
        raise ValueError(f"out_dtype must be None, {dtype_name(a.dtype)} or float32, got {dtype_name(out_dtype)}")
    kernels = select("fixed_matmul", resolve("fixed_matmul", backend), a)
    with torch.no_grad():
        out: torch.Tensor = kernels.run(a, b, bias, out_dtype or a.dtype)
    return out
