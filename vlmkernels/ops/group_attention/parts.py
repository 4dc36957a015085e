"""Group attention on the CPU by torch's flash attention, in two parts: the causal attention of every segment to itself, and the
attention of the completions of a group to its prefix. With out_i the output of part i and lse_i its log-sum-exp, the merged
results are
    lse = logaddexp(lse_1, lse_2),  out = sum_i out_i e^(lse_i - lse).
The gradient of a part's scores s is e^(s - lse) (dout . v - dout . out) with the merged out and lse: the part's own backward
pass computes it if it is called with the merged results.
"""

from itertools import groupby

import torch

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def unsupported(query: torch.Tensor) -> str | None:
    return None if query.device.type == "cpu" else f"supports cpu tensors, got {query.device.type}"


def _heads_first(x: torch.Tensor, start: int, stop: int, length: int) -> torch.Tensor:
    """View the segments of one length in [start, stop), (n * length, H, ...), as (n, H, length, ...)."""
    return x[start:stop].unflatten(0, (-1, length)).transpose(1, 2)


def _runs(layout) -> list[tuple[int, int, int]]:
    """Return (start, stop, length) of each run of neighboring segments of the same length."""
    runs, start = [], 0
    for length, group in groupby(layout.segments):
        stop = start + length * len(list(group))
        if length:
            runs.append((start, stop, length))
        start = stop
    return runs


def _prefixed(layout) -> list[tuple[int, int, int]]:
    """Return (start of the prefix, start of the completions, end) of the groups whose completions have tokens."""
    return [group for group in layout.groups if group[2] > group[1]]


class _Parts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, layout, scale):
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse = torch.empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))
        for start, stop, length in _runs(layout):
            q, k, v = (_heads_first(x, start, stop, length) for x in (query, key, value))
            for whole, part in zip((out, lse), _forward(q, k, v, 0.0, True, scale=scale), strict=True):
                _heads_first(whole, start, stop, length).copy_(part)
        for begin, first, end in _prefixed(layout):
            q = _heads_first(query, first, end, end - first)
            k, v = (_heads_first(x, begin, first, first - begin) for x in (key, value))
            other, lse_other = (x[0].transpose(0, 1) for x in _forward(q, k, v, 0.0, False, scale=scale))
            own, lse_own = out[first:end], lse[first:end].clone()
            lse[first:end] = torch.logaddexp(lse_own, lse_other)
            share, share_other = ((x - lse[first:end]).exp().unsqueeze(-1) for x in (lse_own, lse_other))
            own.copy_(own * share + other * share_other)
        ctx.layout, ctx.scale = layout, scale
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        query, key, value, out, lse = ctx.saved_tensors
        gradients = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]

        def add(queries, keys, causal):
            """Add the gradients of one part. ``queries`` and ``keys`` are (start, stop, length)."""
            places = (queries, keys, keys)
            inputs = [_heads_first(x, *place) for x, place in zip((query, key, value), places, strict=True)]
            results = [_heads_first(x, *queries) for x in (out, lse)]
            parts = _backward(_heads_first(dout, *queries), *inputs, *results, 0.0, causal, scale=ctx.scale)
            for total, part, place in zip(gradients, parts, places, strict=True):
                _heads_first(total, *place).add_(part)

        for run in _runs(ctx.layout):
            add(run, run, causal=True)
        for begin, first, end in _prefixed(ctx.layout):
            add((first, end, end - first), (begin, first, first - begin), causal=False)
        return *gradients, None, None


def run(query, key, value, layout, scale):
    return _Parts.apply(query, key, value, layout, scale)
