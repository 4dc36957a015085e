"""Linear layers with few rows, as in decoding. Imports only torch: ``_C`` loads on first use."""

import torch

from vlmkernels.backend import resolve, select
from vlmkernels.ops.checks import require_device, require_dtype, require_shape, require_tensor

__all__ = ["few_rows_linear"]


def few_rows_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, backend: str = "auto"
) -> torch.Tensor:
    """Return ``torch.nn.functional.linear(x, weight, bias)``. There are no gradients.

    For about 8 to 64 rows on the CPU, or 2 to 64 if the weight is larger than the caches: libraries for matrix products copy
    blocks of the weight into another order first, which pays only with more rows. With the backend "cpp", a result does not
    depend on the other rows of ``x``.

    Args:
        x: (M, K), fp32 for the backend "cpp".
        weight: (N, K), in the dtype of ``x``. The last axes of both must be contiguous for the backend "cpp".
        bias: (N,).
        backend: "cpp", "torch" or "auto"; see ``vlmkernels.backend``.
    """
    for name, tensor in (("x", x), ("weight", weight)):
        require_tensor(name, tensor)
        if tensor.dim() != 2:
            raise ValueError(f"{name} must have two axes, got {tuple(tensor.shape)}")
    require_dtype("weight", weight, x.dtype)
    require_device("weight", weight, x.device, "x")
    require_shape("weight", weight, (len(weight), x.shape[1]), "x")
    if bias is not None:
        require_dtype("bias", bias, x.dtype)
        require_device("bias", bias, x.device, "x")
        require_shape("bias", bias, (len(weight),), "weight")
    kernels = select("few_rows_linear", resolve("few_rows_linear", backend), x, weight)
    out: torch.Tensor = kernels.fwd(x, weight, bias)
    return out
