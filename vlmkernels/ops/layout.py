"""Strides of a tensor's leading axes, for kernels that address rows."""

import torch


def leading_axes(tensor: torch.Tensor) -> list[tuple[int, int]]:
    """Return (size, stride) of the leading axes, outermost first. Neighboring axes that one stride describes are merged."""
    axes: list[tuple[int, int]] = []
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    return axes


def row_layout(tensor: torch.Tensor) -> tuple[int, int, int] | None:
    """Return (inner, stride_outer, stride_inner); row n is at (n // inner) * stride_outer + (n % inner) * stride_inner.

    It is None if the leading axes do not merge into two, or the last axis is not contiguous.
    """
    axes = leading_axes(tensor)
    if len(axes) > 2 or (tensor.stride(-1) != 1 and tensor.shape[-1] > 1):
        return None
    *outer, (inner, stride_inner) = axes or [(1, 0)]
    return inner, outer[0][1] if outer else 0, stride_inner


def unsupported_rows(tensor: torch.Tensor) -> str | None:
    """Return why a kernel that addresses rows by ``row_layout`` does not support ``tensor``; None if it does."""
    if row_layout(tensor) is None:
        return f"supports a contiguous last axis and leading axes that merge into at most two, got strides {tensor.stride()}"
    return None


def unsupported_last_axis(tensor: torch.Tensor) -> str | None:
    """Return why a kernel that needs a contiguous last axis does not support ``tensor``; None if it does."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        return f"supports a contiguous last axis, got strides {tensor.stride()}"
    return None
