"""Tree attention on the CPU by torch's flash attention, in parts: the causal attention of every segment to itself, the
attention of all tokens that follow a segment to it, and the attention of the tokens of a bidirectional block to the later ones.
With out_i the output of part i and lse_i its log-sum-exp, the merged results are
    lse = logaddexp(lse_1, lse_2),  out = sum_i out_i e^(lse_i - lse).
The gradient of a part's scores s is e^(s - lse) (dout . v - dout . out) with the merged out and lse: the part's own backward
pass computes it if it is called with the merged results.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch

from vlmkernels.ops.tree_attention.layout import TreeLayout

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
ROWS = 256  # queries of a part with a mask, which is (queries, keys)


def unsupported(query: torch.Tensor, layout: TreeLayout | None = None, window: int | None = None) -> str | None:
    return None if query.device.type == "cpu" else f"supports cpu tensors, got {query.device.type}"


class Part(NamedTuple):
    """Queries and keys of one call, as slices of the pack or, for copies, as (n,) int64 indices.

    Attributes:
        length: the tokens are several sequences of this length, each with its own keys. None: one sequence.
        is_causal: whether a query sees the keys up to its own place only.
        band: the arguments of ``_band``, or None if the queries see all keys (or, if causal, all keys up to their place).
    """

    queries: slice | torch.Tensor
    keys: slice | torch.Tensor
    length: int | None = None
    is_causal: bool = False
    band: tuple | None = None


@lru_cache(maxsize=8)
def _band(rows: int, keys: int, offset: int, window: int, is_causal: bool) -> torch.Tensor:
    """Return (rows, keys) fp32, 0 where query i sees key j and -inf elsewhere. Query 0 is ``offset`` tokens after key 0."""
    distance = offset + torch.arange(rows).unsqueeze(1) - torch.arange(keys)
    hidden = distance >= window
    if is_causal:
        hidden |= distance < 0
    return torch.zeros(rows, keys).masked_fill_(hidden, -torch.inf)


@lru_cache(maxsize=16)  # all layers of a pass have the same layouts
def _plan(layout: TreeLayout, window: int | None) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """Return the parts of all segments with themselves, which cover the pack, and all other parts."""
    blocks, layout = layout.blocks, layout.condensed
    limit = layout.num_tokens if window is None else window
    own: list[Part] = []
    segments = [segment for segment, length in enumerate(layout.lengths) if length]
    for length, group in groupby(segments, lambda segment: layout.lengths[segment]):
        starts = [layout.starts[segment] for segment in group]
        if length > limit:
            own += [part for start in starts for part in _windowed(start, start + length, limit)]
        else:  # neighbors of the same length are one call
            place = slice(starts[0], starts[-1] + length)
            own.append(Part(place, place, length, is_causal=True))
    others = [part for segment in segments for part in _followers(layout, segment, limit)]
    for spans in blocks:
        # In reverse order, the queries before the last token and the keys after the first are causal.
        tokens = torch.cat([torch.arange(start, stop) for start, stop in spans]).flip(0)
        if len(tokens) > 1:
            others.append(Part(tokens[1:], tokens[:-1], is_causal=True))
    return tuple(own), tuple(others)


def _windowed(start: int, stop: int, window: int) -> Iterator[Part]:
    """Divide the attention of a segment that is longer than the window to itself."""
    for first in range(start, stop, ROWS):
        last, low = min(first + ROWS, stop), max(start, first - window + 1)
        yield Part(slice(first, last), slice(low, last), band=(last - first, last - low, first - low, window, True))


def _followers(layout: TreeLayout, segment: int, window: int) -> Iterator[Part]:
    """Divide the attention of all tokens that follow ``segment`` to it."""
    begin, length = layout.starts[segment], layout.lengths[segment]
    stop, end = begin + length, layout.ends[segment]
    if stop == end:
        return
    shift = layout.offsets[segment] - begin  # from indices in the segment to positions
    following = range(segment + 1, len(layout.lengths))
    # (index of the first token, its position, number of tokens) of each segment that follows
    runs = [(layout.starts[s], layout.offsets[s], layout.lengths[s]) for s in following if begin < layout.starts[s] < end]
    if max(position + count for _, position, count in runs) - 1 - (begin + shift) < window:
        yield Part(slice(stop, end), slice(begin, stop))
        return
    for start, position, count in runs:
        seeing = min(count, stop + shift - 1 + window - position)  # the later tokens see nothing of the segment
        for row in range(0, seeing, ROWS):
            rows = min(ROWS, seeing - row)
            low = max(begin, position + row - window + 1 - shift)
            sees_all = position + row + rows - 1 - (low + shift) < window
            band = None if sees_all else (rows, stop - low, position + row - (low + shift), window, False)
            yield Part(slice(start + row, start + row + rows), slice(low, stop), band=band)


def _heads_first(x: torch.Tensor, place: slice | torch.Tensor, length: int | None) -> torch.Tensor:
    """Return the sequences of one length at a place of ``x``, (n * length, H, ...), as (n, H, length, ...)."""
    tokens = x[place]
    return tokens.unflatten(0, (-1, length or len(tokens))).transpose(1, 2)


def _mask(part: Part, lse: torch.Tensor) -> torch.Tensor | None:
    # torch 2.14 reads a mask in fp32 wrongly if the queries are in fp64.
    return None if part.band is None else _band(*part.band).to(lse.dtype)


class _Parts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, layout, window, scale):
        own, others = _plan(layout, window)
        precise = torch.promote_types(query.dtype, torch.float32)
        # Of several merges only the last may round.
        dtype = precise if len(others) > 1 else query.dtype
        out = torch.empty_like(query, dtype=dtype, memory_format=torch.contiguous_format)
        lse = torch.empty(query.shape[:2], dtype=precise)

        def attend(part):
            q = _heads_first(query, part.queries, part.length)
            k, v = (_heads_first(x, part.keys, part.length) for x in (key, value))
            return _forward(q, k, v, 0.0, part.is_causal, attn_mask=_mask(part, lse), scale=scale)

        for part in own:
            for whole, result in zip((out, lse), attend(part), strict=True):
                _heads_first(whole, part.queries, part.length).copy_(result)
        for part in others:
            rows = part.queries
            other, lse_other = (x[0].transpose(0, 1) for x in attend(part))
            lse_own = lse[rows].clone()
            merged = torch.logaddexp(lse_own, lse_other)
            share, share_other = ((x - merged).exp().unsqueeze(-1) for x in (lse_own, lse_other))
            lse[rows], out[rows] = merged, (out[rows] * share + other * share_other).to(dtype)
        out = out.to(query.dtype)
        ctx.layout, ctx.window, ctx.scale = layout, window, scale
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        query, key, value, out, lse = ctx.saved_tensors
        own, others = _plan(ctx.layout, ctx.window)
        dtype = lse.dtype if len(others) > 1 else query.dtype  # sums of more than two parts are rounded once
        inputs = query, key, value
        gradients = [torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in inputs]
        for part in (*own, *others):
            places = part.queries, part.keys, part.keys
            inputs = [_heads_first(x, place, part.length) for x, place in zip((query, key, value), places, strict=True)]
            upstream, *results = (_heads_first(x, part.queries, part.length) for x in (dout, out, lse))
            added = _backward(upstream, *inputs, *results, 0.0, part.is_causal, attn_mask=_mask(part, lse), scale=ctx.scale)
            for total, gradient, place in zip(gradients, added, places, strict=True):
                if isinstance(place, torch.Tensor):
                    total.index_add_(0, place, gradient[0].transpose(0, 1).to(dtype))
                else:
                    _heads_first(total, place, part.length).add_(gradient)
        return *(x.to(query.dtype) for x in gradients), None, None, None


def _with_rows(x: torch.Tensor) -> torch.Tensor:
    """Return ``x``, or a copy: torch's kernels read queries as if their last axis were contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def run(query, key, value, layout, window, scale):
    return _Parts.apply(*map(_with_rows, (query, key, value)), layout, window, scale)
