"""Causal depthwise convolution of trees of segments, in plain PyTorch.

The convolution runs over the whole pack as if it were one sequence. That is right for all tokens but the first K - 1 of each
segment, unless its path lies directly before it; their results are then replaced by those of the inputs of their path.

The taps are added one after another: in (N, D), each multiplies all channels of a token by their weights. On a CPU this is
several times as fast as ``torch.nn.functional.conv1d`` with groups.
"""

from functools import lru_cache
from itertools import count
from typing import Any, Literal, NamedTuple, overload

import torch
from torch.nn.functional import silu

from vlmkernels.ops.checks import dtype_name, require_device, require_dtype, require_one_of, require_shape, require_tensor
from vlmkernels.ops.tree_attention.layout import TreeLayout

__all__ = ["causal_conv1d"]

ACTIVATIONS = {"silu": silu, "swish": silu}


@overload
def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    layout: TreeLayout,
    *,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    initial_state: torch.Tensor | None = None,
    return_state: Literal[False] = False,
) -> torch.Tensor: ...


@overload
def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    layout: TreeLayout,
    *,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    initial_state: torch.Tensor | None = None,
    return_state: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    layout: TreeLayout,
    *,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Convolve each channel along every path of a pack of trees: a token sees itself and the K - 1 inputs before it.

    Equivalent, for the inputs ``path`` (T, D) from the root up to a token, preceded by its initial state or zeros, to::

        conv1d(path[-K:].T, weight.unsqueeze(1), bias, groups=D).squeeze(1)

    Args:
        x: (N, D) with N = layout.num_tokens, floating point.
        weight: (D, K) in the dtype of ``x``.
        layout: the segments and their parents, see ``TreeLayout``.
        bias: (D,) in the dtype of ``x``.
        activation: None, or "silu", also called "swish".
        initial_state: (R, D, K - 1), the inputs before each of the R roots of ``layout``. Default: zeros.
        return_state: also return the last inputs of each segment.

    Returns:
        The output (N, D) in the dtype of ``x``, computed in fp32, or in fp64 for fp64 inputs. With ``return_state`` also the
        last K - 1 inputs of the path of each of the S segments, (S, D, K - 1) in the dtype of ``x``. The tensors get exact
        gradients, summed over the segments that continue a path.

    Raises:
        ValueError, TypeError: a shape, dtype or device is wrong, or ``activation`` is unknown.

    Source: the convolutions of Mamba, https://arxiv.org/abs/2312.00752.
    """
    _check(x, weight, layout, bias, initial_state)
    if activation is not None:
        require_one_of("activation", activation, ACTIVATIONS, "None or ")
    if initial_state is not None and {*layout.lengths} == {1} and {*layout.parents} == {-1}:
        inputs = torch.cat([initial_state.to(x.dtype).transpose(1, 2), x.unsqueeze(1)], 1)  # (N, K, D)
        return _activated(_step(inputs, weight, bias), activation, inputs[:, 1:].transpose(1, 2) if return_state else None)
    plan = _plan(layout, weight.shape[1], x.device)
    rows = None if initial_state is None else initial_state.to(x.dtype).transpose(1, 2).flatten(0, 1)
    out: torch.Tensor = _Convolution.apply(x, weight, bias, rows, plan)
    return _activated(out, activation, plan.last.gather(x, rows).transpose(1, 2) if return_state else None)


def _activated(
    out: torch.Tensor, activation: str | None, states: torch.Tensor | None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    out = out if activation is None else ACTIVATIONS[activation](out)
    return out if states is None else (out, states)


def _step(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Convolve sequences of one token, as in decoding, from their K inputs (N, K, D).

    It needs no plan: a decoding step that is captured as a CUDA graph must not read a plan, whose memory is freed when others
    take its place among those that are kept.
    """
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    out = (inputs.to(dtype) * weight.to(dtype).t()).sum(1)
    out = out if bias is None else out + bias.to(dtype)
    return out.to(inputs.dtype)


def _check(x: Any, weight: Any, layout: TreeLayout, bias: Any, initial_state: Any) -> None:
    require_tensor("x", x)
    require_tensor("weight", weight)
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {dtype_name(x.dtype)}")
    if x.dim() != 2 or len(x) != layout.num_tokens:
        raise ValueError(f"x must be (N, D) of the {layout.num_tokens} tokens of layout, got {tuple(x.shape)}")
    if weight.dim() != 2 or len(weight) != x.shape[1] or not weight.shape[1]:
        raise ValueError(f"weight must be (D, K) with D = {x.shape[1]} and K >= 1, got {tuple(weight.shape)}")
    roots, (channels, width) = layout.parents.count(-1), weight.shape
    for name, tensor, shape, meaning in (
        ("weight", weight, (channels, width), "(D, K)"),
        ("bias", bias, (channels,), "the channels of x"),
        ("initial_state", initial_state, (roots, channels, width - 1), "(roots of layout, D, K - 1)"),
    ):
        if tensor is not None:
            require_tensor(name, tensor)
            require_shape(name, tensor, shape, meaning)
            require_device(name, tensor, x.device, "x")
            if name != "initial_state":
                require_dtype(name, tensor, x.dtype)


class _Windows(NamedTuple):
    """Rows of inputs from the pack and from the initial states; all others are zero.

    Attributes:
        shape: (rows, inputs per row).
        places, tokens: (n,) int64, the places of tokens in the flattened rows, and the tokens.
        initial_places, initial_rows: (m,) int64, the same for the initial states, flattened to (R * (K - 1), D).
    """

    shape: tuple[int, int]
    places: torch.Tensor
    tokens: torch.Tensor
    initial_places: torch.Tensor
    initial_rows: torch.Tensor

    def gather(self, x: torch.Tensor, initial: torch.Tensor | None) -> torch.Tensor:
        """Return the inputs, (rows, inputs per row, D)."""
        inputs = x.new_zeros(self.shape[0] * self.shape[1], x.shape[1])
        inputs = inputs.index_copy(0, self.places, x.index_select(0, self.tokens))
        if initial is not None:
            inputs = inputs.index_copy(0, self.initial_places, initial.index_select(0, self.initial_rows))
        return inputs.view(*self.shape, x.shape[1])

    def scatter_(self, gradient: torch.Tensor, dx: torch.Tensor, dinitial: torch.Tensor | None) -> None:
        """Add the gradient of the gathered inputs to those of the pack and of the initial states."""
        gradient = gradient.flatten(0, 1)
        dx.index_add_(0, self.tokens, gradient.index_select(0, self.places))
        if dinitial is not None:
            dinitial.index_add_(0, self.initial_rows, gradient.index_select(0, self.initial_places))


class _Plan(NamedTuple):
    """What depends only on a layout and K.

    Attributes:
        rows: (F,) int64, the tokens that the convolution over the whole pack gets wrong.
        inputs: their K inputs, (F, K).
        last: the last K - 1 inputs of each segment, (S, K - 1).
    """

    rows: torch.Tensor
    inputs: _Windows
    last: _Windows


@lru_cache(maxsize=16)  # all layers of a pass have the same layout
@torch.inference_mode(False)  # a plan that is first used for inference also serves training
def _plan(layout: TreeLayout, width: int, device: torch.device) -> _Plan:
    before, num = width - 1, layout.num_tokens
    tails: list[list[int]] = []  # the last inputs of each segment: tokens, or num + row of the initial states
    rows: list[int] = []
    windows: list[list[int]] = []
    root = count()
    for start, length, parent in zip(layout.starts, layout.lengths, layout.parents, strict=True):
        first = num + next(root) * before if parent < 0 else 0
        tail = tails[parent] if parent >= 0 else list(range(first, first + before))
        if tail != list(range(start - before, start)):
            path = [*tail, *range(start, start + min(length, before))]
            rows += path[before:]
            windows += [path[i : i + width] for i in range(len(path) - before)]
        tail = [*tail, *range(start + max(length - before, 0), start + length)]
        tails.append(tail[len(tail) - before :])
    parts = [rows, *_parts(windows, num), *_parts(tails, num)]
    host = torch.tensor([x for part in parts for x in part], dtype=torch.int64)
    if device.type == "cuda":
        host = host.pin_memory()
    fixed, *places = host.to(device, non_blocking=True).split([len(part) for part in parts])
    return _Plan(fixed, _Windows((len(rows), width), *places[:4]), _Windows((len(tails), before), *places[4:]))


def _parts(windows: list[list[int]], num: int) -> list[list[int]]:
    """Return the index lists of ``_Windows``."""
    flat = list(enumerate(x for window in windows for x in window))
    tokens = [(place, x) for place, x in flat if x < num]
    initial = [(place, x - num) for place, x in flat if x >= num]
    return [[pair[i] for pair in pairs] for pairs in (tokens, initial) for i in (0, 1)]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: Any, initial: Any, plan: _Plan) -> torch.Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        ctx.plan, ctx.has_bias = plan, bias is not None
        ctx.save_for_backward(x, weight, initial)
        taps, full = weight.to(dtype).t().contiguous(), x.to(dtype)  # (K, D)
        out = full * taps[-1]
        for shift in range(1, min(len(taps), len(out))):
            out[shift:].addcmul_(full[:-shift], taps[-1 - shift])
        out[plan.rows] = (plan.inputs.gather(x, initial).to(dtype) * taps).sum(1)
        if bias is not None:
            out += bias.to(dtype)
        return out.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> Any:
        x, weight, initial = ctx.saved_tensors
        plan: _Plan = ctx.plan
        dtype = torch.promote_types(x.dtype, torch.float32)
        taps, full, dout = weight.to(dtype).t().contiguous(), x.to(dtype), dout.to(dtype)
        dbias = dout.sum(0).to(x.dtype) if ctx.has_bias else None
        dfixed = dout.index_select(0, plan.rows).unsqueeze(1)
        dout = dout.index_fill(0, plan.rows, 0)
        dx, dtaps = dout * taps[-1], torch.zeros_like(taps)
        torch.linalg.vecdot(dout, full, dim=0, out=dtaps[-1])
        for shift in range(1, min(len(taps), len(dout))):
            dx[:-shift].addcmul_(dout[shift:], taps[-1 - shift])
            torch.linalg.vecdot(dout[shift:], full[:-shift], dim=0, out=dtaps[-1 - shift])
        dtaps += (dfixed * plan.inputs.gather(x, initial).to(dtype)).sum(0)
        dinitial = None if initial is None else torch.zeros_like(initial, dtype=dtype)
        plan.inputs.scatter_(dfixed * taps, dx, dinitial)
        if dinitial is not None:
            dinitial = dinitial.to(x.dtype)
        return dx.to(x.dtype), dtaps.t().to(x.dtype), dbias, dinitial, None
