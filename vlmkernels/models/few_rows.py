"""The linear layers of a model in decoding steps on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from torch.nn.functional import linear

from vlmkernels.backend import choose, load, resolve
from vlmkernels.ops.dispatch import needs_dispatcher

_MOST = 64  # rows; with more, the matrix products of torch are as fast
_LEAST = 8  # rows; with fewer, they are faster, unless the weight is larger than the caches
_LARGE = 2**23  # elements of such a weight. With one row, torch is always faster


@contextmanager
def few_rows_linears(model: torch.nn.Module) -> Iterator[None]:
    """Compute fp32 linear layers on the CPU with the op ``few_rows_linear`` where they have few rows, in a ``with`` block.

    Results are equal up to rounding. The ``forward`` of the layers is replaced meanwhile, unless it has been replaced before.
    """
    chosen = [module for module in model.modules() if type(module) is torch.nn.Linear and "forward" not in vars(module)]
    chosen = [module for module in chosen if module.weight.device.type == "cpu" and module.weight.dtype == torch.float32]
    selected = resolve("few_rows_linear", "auto")
    chosen = [module for module in chosen if choose("few_rows_linear", selected, module.weight) == "cpp"]
    for module in chosen:
        module.forward = MethodType(_forward, module)
    try:
        yield
    finally:
        for module in chosen:
            del module.forward


def _is_faster(rows: int, weight: torch.Tensor) -> bool:
    return _LEAST <= rows <= _MOST or (1 < rows < _LEAST and weight.numel() >= _LARGE)


def _forward(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    faster = _is_faster(x.numel() // max(x.shape[-1], 1), self.weight)
    if not faster or x.dtype != torch.float32 or x.shape[-1] != self.in_features or torch.is_grad_enabled():
        return linear(x, self.weight, self.bias)
    if torch.is_autocast_enabled("cpu") or needs_dispatcher(x, self.weight, self.bias):
        return linear(x, self.weight, self.bias)
    # Without the checks of few_rows_linear, which take as long as a small layer: the shapes and dtypes are those of the layer.
    kernels = load("few_rows_linear", "cpp")
    out: torch.Tensor = kernels.fwd(x.reshape(-1, self.in_features).contiguous(), self.weight, self.bias)
    return out.view(*x.shape[:-1], self.out_features)
