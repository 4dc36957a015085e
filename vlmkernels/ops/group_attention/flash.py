"""Group attention on CUDA by flash attention kernels, in two calls whose results are merged as in parts.py.

The backend "flash" uses the kernels of torch (FlashAttention-2); flash4.py uses those of FlashAttention-4 in the same calls.

The first call computes the causal attention of all segments to themselves, the second the attention of the completions of each
group to their prefix. Both are calls for packed sequences with cumulative lengths. The completions of a single group are a
slice of the pack and are not copied; the completions of several groups are concatenated for the second call.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch

from vlmkernels.backend import installed
from vlmkernels.ops.checks import unless_half_on_cuda


def unsupported(query: torch.Tensor) -> str | None:
    width = query.shape[-1]
    if reason := unless_half_on_cuda(query):
        return reason
    if width % 8 or width > 256:
        return f"supports head dimensions that are multiples of 8 up to 256, got {width}"
    if torch.version.hip is not None:
        return "supports NVIDIA GPUs only"
    found = torch.cuda.get_device_capability(query.device)
    if found < (8, 0):
        return f"needs compute capability 8.0 or higher, got {found[0]}.{found[1]}"
    if not installed("triton"):
        return "triton is not installed"
    if not torch.backends.cuda.is_flash_attention_available():
        return "torch was built without flash attention"
    return None


ALIGNED = 4  # int32 elements: FlashAttention-4 copies arguments that do not start at a multiple of 16 bytes


class Sequences(NamedTuple):
    """Packed sequences: their cumulative lengths on the device, and the length of the longest."""

    bounds: torch.Tensor  # (S + 1,) int32
    longest: int


class _Plan(NamedTuple):
    """The arguments of the two calls for a layout. A range is (start, stop) in tokens of the pack."""

    segments: Sequences
    completions: Sequences  # all completions of a group are one sequence
    prefixes: Sequences
    completion_ranges: tuple[tuple[int, int], ...]  # of groups whose completions have tokens
    prefix_ranges: tuple[tuple[int, int], ...]
    completion_rows: torch.Tensor  # (completion tokens,) int32


@lru_cache(maxsize=16)  # all layers of a pass have the same layout
def _plan(layout, device: torch.device) -> _Plan:
    """Build the plan on the host and copy it without waiting for the device."""
    groups = [group for group in layout.groups if group[2] > group[1]]
    completion_ranges = tuple((first, end) for _, first, end in groups)
    prefix_ranges = tuple((begin, first) for begin, first, _ in groups)
    lengths = [
        [length for length in layout.segments if length],  # flash attention defines no log-sum-exp without keys
        [stop - start for start, stop in completion_ranges],
        [stop - start for start, stop in prefix_ranges],
    ]
    parts = [torch.tensor(list(accumulate(x, initial=0))) for x in lengths]
    parts.append(torch.cat([torch.arange(0), *(torch.arange(*x) for x in completion_ranges)]))
    room = [-(-len(part) // ALIGNED) * ALIGNED for part in parts]
    host = torch.cat([torch.nn.functional.pad(x, (0, size - len(x))) for x, size in zip(parts, room, strict=True)])
    host = host.to(torch.int32)
    if device.type == "cuda":
        host = host.pin_memory()
    placed = host.to(device, non_blocking=True).split(room)
    *bounds, rows = (x[: len(part)] for x, part in zip(placed, parts, strict=True))
    sequences = [Sequences(x, max(values, default=0)) for x, values in zip(bounds, lengths, strict=True)]
    return _Plan(*sequences, completion_ranges, prefix_ranges, rows)


class Kernels(NamedTuple):
    """Flash attention over packed sequences, in one library.

    ``forward(query, key, value, queries, keys, causal, scale)`` returns the output (N, Hq, D) and the log-sum-exp (Hq, N) in
    fp32. ``backward(dout, query, key, value, out, lse, queries, keys, causal, scale)`` returns the gradients of query, key and
    value through one call, given the merged ``out`` and ``lse``. ``queries`` and ``keys`` are ``Sequences``.
    """

    forward: Callable
    backward: Callable


def _forward(query, key, value, queries: Sequences, keys: Sequences, causal: bool, scale: float):
    bounds = queries.bounds, keys.bounds, queries.longest, keys.longest
    out, lse, *_ = torch.ops.aten._flash_attention_forward(query, key, value, *bounds, 0.0, causal, False, scale=scale)
    if lse.shape != (query.shape[1], query.shape[0]):
        raise RuntimeError(f"flash attention of torch {torch.__version__} returned a log-sum-exp of {tuple(lse.shape)}")
    return out, lse


def _backward(dout, query, key, value, out, lse, queries: Sequences, keys: Sequences, causal: bool, scale: float):
    bounds = queries.bounds, keys.bounds, queries.longest, keys.longest
    dropout_state = lse.new_empty(0)  # not read without dropout
    return torch.ops.aten._flash_attention_backward(
        dout, query, key, value, out, lse, *bounds, 0.0, causal, dropout_state, dropout_state, scale=scale
    )


KERNELS = Kernels(_forward, _backward)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """Return ``x``, or a copy if the kernels cannot read it in vectors of 16 bytes."""
    step = 16 // x.element_size()
    if x.stride(-1) == 1 and all(offset % step == 0 for offset in (x.storage_offset(), *x.stride()[:-1])):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _gather(x: torch.Tensor, ranges: Sequence[tuple[int, int]], dim: int = 0) -> torch.Tensor:
    """Concatenate the ranges of ``x``; a view if there is one range."""
    views = [x.narrow(dim, start, stop - start) for start, stop in ranges]
    return views[0] if len(views) == 1 else torch.cat(views, dim)


def _scatter_add_(x: torch.Tensor, ranges: Sequence[tuple[int, int]], part: torch.Tensor) -> None:
    """Add the rows of ``part`` to the ranges of ``x``."""
    views = [x[start:stop] for start, stop in ranges]
    torch._foreach_add_(views, part.split([len(view) for view in views]))


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, layout, scale, kernels):
        from vlmkernels.ops.group_attention.merge import merge_

        plan = _plan(layout, query.device)
        query, key, value = aligned(query.contiguous()), aligned(key), aligned(value)
        out, lse = kernels.forward(query, key, value, plan.segments, plan.segments, True, scale)
        if plan.completion_ranges:
            q = _gather(query, plan.completion_ranges)
            k, v = (_gather(x, plan.prefix_ranges) for x in (key, value))
            part, part_lse = kernels.forward(q, k, v, plan.completions, plan.prefixes, False, scale)
            merge_(out, lse, part, part_lse, plan.completion_rows)
        ctx.plan, ctx.scale, ctx.kernels = plan, scale, kernels
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        query, key, value, out, lse = ctx.saved_tensors
        plan, scale, kernels = ctx.plan, ctx.scale, ctx.kernels
        dout = aligned(dout.contiguous())
        gradients = kernels.backward(dout, query, key, value, out, lse, plan.segments, plan.segments, True, scale)
        if plan.completion_ranges:
            places = plan.completion_ranges, plan.prefix_ranges, plan.prefix_ranges
            inputs = [_gather(x, place) for x, place in zip((query, key, value), places, strict=True)]
            dout, out = (_gather(x, plan.completion_ranges) for x in (dout, out))
            lse = _gather(lse, plan.completion_ranges, 1).contiguous()
            parts = kernels.backward(dout, *inputs, out, lse, plan.completions, plan.prefixes, False, scale)
            for total, place, part in zip(gradients, places, parts, strict=True):
                _scatter_add_(total, place, part)
        return *gradients, None, None, None


def attend(query, key, value, layout, scale, kernels: Kernels):
    return _Flash.apply(query, key, value, layout, scale, kernels)


def run(query, key, value, layout, scale):
    return attend(query, key, value, layout, scale, KERNELS)
