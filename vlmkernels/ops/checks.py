"""Checks of arguments. Each raises an error that names the argument, the rule and the value."""

import difflib
import importlib
import math
import numbers
import re
from collections.abc import Collection, Iterable
from functools import reduce
from typing import Any

import torch


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without its module, for example float32."""
    return str(dtype).removeprefix("torch.")


def unless_half_on_cuda(query: torch.Tensor) -> str | None:
    """Return why kernels for bf16 and fp16 on CUDA do not support ``query``; None if they do."""
    if query.device.type != "cuda":
        return f"supports CUDA tensors, got {query.device.type}"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"supports bfloat16 and float16, got {dtype_name(query.dtype)}"
    return None


def require_tensor(name: str, value: object) -> None:
    """Check that ``value`` is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def require_number(name: str, value: object, rule: str, kind: type = numbers.Real) -> None:
    """Check that ``value`` is a number of ``kind``, of Python or NumPy, and not a bool."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name} must {rule}, got {value!r}")


def did_you_mean(value: object, names: Iterable[str], meanings: dict[str, str] | None = None) -> str:
    """Return the end of an error message, " (did you mean iou?)", or "" if no name resembles ``value``.

    Args:
        value: what was given instead of a name. Upper case, hyphens and spaces count as lower case and underscores.
        names: the valid names.
        meanings: other spellings and their valid names, such as the names of another library.
    """

    def plain(text: str) -> str:
        return re.sub(r"[-\s]", "_", text.strip().lower())

    spellings = {plain(name): name for name in names} | {plain(name): valid for name, valid in (meanings or {}).items()}
    near = difflib.get_close_matches(plain(str(value)), spellings, n=1)
    return f" (did you mean {spellings[near[0]]}?)" if near else ""


def import_object(name: str, path: str) -> Any:
    """Return the object at an import path "module:attribute", the value of the argument ``name``.

    Raises:
        ValueError: the module cannot be imported or lacks the attribute.
    """
    module, _, attribute = path.partition(":")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{name} must be importable, got {path!r}: {error}") from error
    except Exception as error:  # raised by the code of the module
        raise ValueError(f"{name} must be importable, got {path!r}: {type(error).__name__}: {error}") from error
    try:
        return reduce(getattr, attribute.split("."), found)
    except AttributeError as error:
        hint = did_you_mean(attribute, dir(found))
        raise ValueError(f"{name} must be importable, got {path!r}: {error}{hint}") from error


def require_one_of(name: str, value: object, rows: Collection[str], prefix: str = "") -> None:
    """Check that ``value`` is one of the strings ``rows``."""
    if not isinstance(value, str) or value not in rows:
        raise ValueError(f"{name} must be {prefix}one of {', '.join(rows)}, got {value!r}{did_you_mean(value, rows)}")


def require_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """Check that ``tensor`` has the shape ``shape``, which the error describes as the shape of ``meaning``."""
    if tensor.shape != shape:
        raise ValueError(f"{name} must have the shape of {meaning}, {tuple(shape)}, got {tuple(tensor.shape)}")


def require_dtype(name: str, tensor: torch.Tensor, *dtypes: torch.dtype) -> None:
    """Check that ``tensor`` has one of ``dtypes``."""
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must have dtype {' or '.join(map(dtype_name, dtypes))}, got {dtype_name(tensor.dtype)}")


def require_device(name: str, tensor: torch.Tensor, device: torch.device, owner: str) -> None:
    """Check that ``tensor`` is on ``device``, the device of the argument ``owner``."""
    if tensor.device != device:
        raise ValueError(f"{name} must be on the device of {owner}, {device}, got {tensor.device}")


def require_positive(name: str, value: float) -> None:
    """Check that ``value`` is a finite number > 0."""
    require_number(name, value, "be a finite number > 0")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number > 0, got {value}")


def require_factor(name: str, value: float) -> None:
    """Check that ``value`` is > 0 and within the range of fp32, also after a multiplication by log2(e)."""
    require_positive(name, value)
    low, high = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max / 2
    if not low <= value <= high:
        raise ValueError(f"{name} must be within [{low:.2g}, {high:.2g}], the range of fp32, got {value}")


def require_nowhere(bad: torch.Tensor, name: str, rule: str, tensor: torch.Tensor) -> None:
    """Check that ``bad`` is false everywhere; the error gives the first value of ``tensor`` where it is true.

    This waits for the device.
    """
    if bad.any():
        where = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"{name} must {rule}, got {tensor[where].item()} at index {where}")


def require_indices(name: str, indices: torch.Tensor, size: int, what: str, mask: torch.Tensor | None = None) -> None:
    """Check that every index, where ``mask`` is true, is in [0, size). On a GPU nothing is checked, to not wait for it."""
    if indices.device.type != "cpu" or not indices.numel():
        return
    low, high = indices.aminmax()
    if low.item() >= 0 and high.item() < size:  # usual, and faster than the comparisons
        return
    bad = (indices < 0) | (indices >= size)
    if mask is not None:
        bad &= mask
    require_nowhere(bad, name, f"be in [0, {size}), {what}", indices)


def require_targets(
    source_name: str,
    source: torch.Tensor,
    leading: str,
    targets: Any,
    mask: torch.Tensor | None,
    rows: torch.Tensor | None,
    mask_name: str = "mask",
) -> None:
    """Check types, dtypes, shapes and devices of ``targets``, ``mask`` and ``rows``.

    Args:
        source_name: the name of the argument ``source``.
        source: (..., V) logits or (..., H) hidden states, from which the results are computed.
        leading: how an error describes the leading axes of ``source``.
        targets: int64, in the shape of ``rows`` or, without rows, of the leading axes of ``source``.
        mask: bool, in the shape of ``targets``, or None.
        rows: int64, or None.
        mask_name: the name of the argument ``mask``.
    """
    require_tensor("targets", targets)
    for name, tensor, dtype in (("targets", targets, torch.int64), (mask_name, mask, torch.bool), ("rows", rows, torch.int64)):
        if tensor is not None:
            require_dtype(name, tensor, dtype)
            require_device(name, tensor, source.device, source_name)
    if rows is None:
        require_shape("targets", targets, source.shape[:-1], leading)
    else:
        require_shape("targets", targets, rows.shape, "rows")
    if mask is not None:
        require_shape(mask_name, mask, targets.shape, "targets")


def require_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Check that ``query`` is (N, Hq, D), and ``key`` and ``value`` are (N, Hkv, D'), where Hkv divides Hq."""
    if query.dim() != 3:
        raise ValueError(f"query must be (N, Hq, D), got {tuple(query.shape)}")
    num, heads, width = query.shape
    if not heads or not width:
        raise ValueError(f"query must have at least one head of width 1, got {tuple(query.shape)}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dim() != 3 or len(tensor) != num or heads % max(tensor.shape[1], 1):
            raise ValueError(
                f"{name} must be (N, Hkv, D) with N = {num} and Hkv a divisor of {heads}, got {tuple(tensor.shape)}"
            )
        require_dtype(name, tensor, query.dtype)
        require_device(name, tensor, query.device, "query")
