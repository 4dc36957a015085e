"""Argument checks: an error names the argument, the rule and the value."""

import math
import numbers
from collections.abc import Collection

import torch


def require(ok: bool, name: str, rule: str, value: object, error: type[Exception] = ValueError) -> None:
    """Raise ``error`` as "<name> must <rule>, got <value>" unless ``ok``."""
    if not ok:
        raise error(f"{name} must {rule}, got {value}")


def require_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def require_number(name: str, value: object, rule: str, kind: type = numbers.Real) -> None:
    """``value`` is a number of ``kind``, of Python or NumPy; a bool is none."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name} must {rule}, got {value!r}")


def require_one_of(name: str, value: object, rows: Collection[str], prefix: str = "") -> None:
    require(isinstance(value, str) and value in rows, name, f"be {prefix}one of {', '.join(rows)}", repr(value))


def require_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have the shape of {meaning}, {tuple(shape)}, got {tuple(tensor.shape)}")


def require_dtype(name: str, tensor: torch.Tensor, *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must have dtype {names}, got {str(tensor.dtype).removeprefix('torch.')}")


def require_device(name: str, tensor: torch.Tensor, device: torch.device, owner: str) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on the device of {owner}, {device}, got {tensor.device}")


def require_positive(name: str, value: float) -> None:
    require_number(name, value, "be finite and > 0")
    require(0 < value < math.inf, name, "be finite and > 0", value)


def require_factor(name: str, value: float) -> None:
    """``value`` is what a kernel multiplies or divides by in fp32, where it must be neither 0 nor, times log2(e), inf."""
    require_positive(name, value)
    low, high = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max / 2
    require(low <= value <= high, name, f"be within [{low:.2g}, {high:.2g}], the range of fp32", value)


def require_nowhere(bad: torch.Tensor, name: str, rule: str, tensor: torch.Tensor) -> None:
    """Raise, with the first value and its index, where ``bad`` holds. Waits for the device."""
    if bad.any():
        where = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"{name} must {rule}, got {tensor[where].item()} at index {where}")


def require_indices(name: str, indices: torch.Tensor, size: int, what: str, mask: torch.Tensor | None = None) -> None:
    """Every index (where ``mask`` is true) lies in [0, size). CPU tensors only: on a GPU this would wait for the device."""
    if indices.device.type != "cpu":
        return
    bad = (indices < 0) | (indices >= size)
    if mask is not None:
        bad &= mask
    require_nowhere(bad, name, f"be in [0, {size}), {what}", indices)


def require_targets(owner: str, of: torch.Tensor, leading: str, targets, mask, rows) -> None:
    """What chooses a token of each row of ``of``, the argument ``owner``: int64 targets, one for each of ``rows`` or else for
    each row, that is for each of its ``leading``; a bool mask like them."""
    require_tensor("targets", targets)
    for name, tensor, dtype in (("targets", targets, torch.int64), ("mask", mask, torch.bool), ("rows", rows, torch.int64)):
        if tensor is not None:
            require_dtype(name, tensor, dtype)
            require_device(name, tensor, of.device, owner)
    if rows is None:
        require_shape("targets", targets, of.shape[:-1], leading)
    else:
        require_shape("targets", targets, rows.shape, "rows")
    if mask is not None:
        require_shape("mask", mask, targets.shape, "targets")


def require_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """query (N, Hq, D), key and value (N, Hkv, D or another width), Hkv a divisor of Hq."""
    require(query.dim() == 3, "query", "be (N, Hq, D)", tuple(query.shape))
    rule = f"be (N, Hkv, D) with N = {len(query)} and Hkv a divisor of {query.shape[1]}"
    for name, tensor in (("key", key), ("value", value)):
        fits = tensor.dim() == 3 and len(tensor) == len(query) and query.shape[1] % max(tensor.shape[1], 1) == 0
        require(fits, name, rule, tuple(tensor.shape))
        require_dtype(name, tensor, query.dtype)
        require_device(name, tensor, query.device, "query")
