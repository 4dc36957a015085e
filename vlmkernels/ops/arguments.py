"""Convert arguments from the forms in which callers have them: masks of 0 and 1, integers of any dtype, lists, arrays."""

from typing import Any

import torch

from vlmkernels.ops.checks import dtype_name, require_nowhere
from vlmkernels.ops.dispatch import needs_dispatcher

Device = torch.device | str | None

IGNORE_INDEX = -100  # the target of tokens without a loss, as in torch.nn.functional.cross_entropy


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether the values can be read without waiting for a device, and outside of compiled graphs and fake tensors."""
    return not needs_dispatcher(tensor) and tensor.device.type == "cpu"


def as_tensor(name: str, value: Any, device: Device = None, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return a tensor as it is; convert a list, an array or a number.

    Args:
        device, dtype: those of the result, if ``value`` is not a tensor. Without ``dtype``, numbers get torch's default.
    """
    if not isinstance(value, torch.Tensor):
        value = _converted(name, value, device, dtype)
    if value.is_complex():
        raise TypeError(f"{name} must be real, got {dtype_name(value.dtype)}")
    return value


def _converted(name: str, value: Any, device: Device, dtype: torch.dtype | None) -> torch.Tensor:
    if isinstance(value, (str, bytes, dict, set)):
        raise TypeError(f"{name} must be a tensor, an array or a list of numbers, got {type(value).__name__}")
    try:
        try:
            return torch.as_tensor(value, dtype=dtype, device=device)
        except (TypeError, ValueError):  # a reversed array, one of objects or of another byte order, a column of a table
            if not hasattr(value, "tolist"):
                raise
            return torch.as_tensor(value.tolist(), dtype=dtype, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a tensor, an array or a list of numbers, got {value!r:.80}: {error}") from error


def as_mask(name: str, mask: Any, device: Device = None) -> torch.Tensor | None:
    """Return a mask as bool. Other dtypes must hold only 0 and 1.

    On a GPU, where this check would wait for the device, other values count as 1.
    """
    if mask is None:
        return None
    mask = as_tensor(name, mask, device)
    if mask.dtype == torch.bool:
        return mask
    result = mask != 0
    if is_readable(mask):
        require_nowhere(result & (mask != 1), name, "hold only 0 and 1", mask)
    return result


def as_indices(name: str, indices: Any, dtype: torch.dtype = torch.int64, device: Device = None) -> torch.Tensor:
    """Return integers as ``dtype``."""
    indices = as_tensor(name, indices, device)
    if indices.dtype == dtype:
        return indices
    if indices.numel() and (indices.is_floating_point() or indices.dtype == torch.bool):
        raise TypeError(f"{name} must be integers, got {dtype_name(indices.dtype)}")
    return indices.to(dtype)


def without_ignored(targets: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
    """Return ``mask`` without the targets that are IGNORE_INDEX. None, for all targets, stays None if none of them is.

    On a GPU and in compiled graphs, where the targets cannot be read, the result is always a mask.
    """
    if is_readable(targets) and (not targets.numel() or targets.min().item() >= 0):  # faster than a comparison
        return mask
    counted = targets != IGNORE_INDEX
    if mask is None:
        return counted
    return mask & counted if mask.shape == targets.shape else mask  # require_targets names the shapes


def as_cu_seqlens(cu_seqlens: Any, device: Device = None) -> torch.Tensor:
    """Return the bounds of packed sequences as int32."""
    return as_indices("cu_seqlens", cu_seqlens, torch.int32, device)


def as_grid(name: str, grid: Any) -> torch.Tensor:
    """Return the grids of images as (n, 3) int64, also of one image, (3,), and of none, []. Lists become CPU tensors."""
    grid = as_indices(name, grid, device="cpu")
    return grid.view(-1, 3) if grid.shape in ((3,), (0,)) else grid
