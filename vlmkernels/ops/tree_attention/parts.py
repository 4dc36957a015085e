"""Tree attention on the CPU by torch's flash attention, in parts: the attention of every piece of the tree to itself, and the
attention of all tokens that follow a piece to the piece. With out_i the output of part i and lse_i its log-sum-exp, the merged
results are
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
from vlmkernels.ops.tree_attention.pieces import Piece, linked_pieces, pieces

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
ROWS = 256  # queries of a part with a mask, which is (queries, keys)


def unsupported(query: torch.Tensor, layout: TreeLayout | None = None, window: int | None = None) -> str | None:
    return None if query.device.type == "cpu" else f"supports cpu tensors, got {query.device.type}"


class Part(NamedTuple):
    """Queries and keys of one call, as ranges (start, stop) of the pack.

    Attributes:
        length: the tokens are several sequences of this length, each with its own keys. None: one sequence.
        is_causal: whether a query sees the keys up to itself only.
        band: the arguments of ``_band``, or None if the queries see all keys (or, if causal, all keys up to themselves).
    """

    queries: tuple[int, int]
    keys: tuple[int, int]
    length: int | None = None
    is_causal: bool = False
    band: tuple | None = None


@lru_cache(maxsize=64)
def _band(rows: int, keys: int, offset: int, window: int, is_causal: bool) -> torch.Tensor:
    """Return (rows, keys) fp32, 0 where query i sees key j and -inf elsewhere. Query 0 is ``offset`` tokens after key 0."""
    distance = offset + torch.arange(rows).unsqueeze(1) - torch.arange(keys)
    hidden = distance >= window
    if is_causal:
        hidden |= distance < 0
    return torch.zeros(rows, keys).masked_fill_(hidden, -torch.inf)


@lru_cache(maxsize=16)  # all layers of a pass have the same layouts
def _plan(layout: TreeLayout, window: int | None) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """Return the parts of all pieces with themselves, which cover the pack, and the parts of other tokens with pieces."""
    limit = layout.num_tokens if window is None else window
    own: list[Part] = []
    for (length, is_span), group in groupby(pieces(layout), lambda piece: (piece.stop - piece.start, piece.is_span)):
        run = list(group)
        if length > limit:
            own += [part for piece in run for part in _windowed(piece, limit)]
        else:  # neighbors of the same length are one call
            place = run[0].start, run[-1].stop
            own.append(Part(place, place, length, not is_span))
    others = [part for piece in pieces(layout) for part in _followers(layout, piece, limit)]
    for span, later in linked_pieces(layout):
        others += [Part((span.start, span.stop), (other.start, other.stop)) for other in later]
    return tuple(own), tuple(others)


def _windowed(piece: Piece, window: int) -> Iterator[Part]:
    """Divide the attention of a piece that is longer than the window to itself."""
    for first in range(piece.start, piece.stop, ROWS):
        last = min(first + ROWS, piece.stop)
        low, high = max(piece.start, first - window + 1), piece.stop if piece.is_span else last
        yield Part((first, last), (low, high), band=(last - first, high - low, first - low, window, not piece.is_span))


def _followers(layout: TreeLayout, piece: Piece, window: int) -> Iterator[Part]:
    """Divide the attention of all tokens that follow ``piece`` to it."""
    shift = layout.offsets[piece.segment] - layout.starts[piece.segment]  # from indices to positions
    begin, stop = piece.start + shift, piece.stop + shift
    segments = range(piece.segment, len(layout.lengths))
    runs = []  # (index of the first token, its position, number of tokens)
    for segment in segments:
        first = max(layout.starts[segment], piece.stop)
        if first >= piece.end:
            break
        if count := layout.starts[segment] + layout.lengths[segment] - first:
            runs.append((first, first - layout.starts[segment] + layout.offsets[segment], count))
    if not runs:
        return
    if max(position + count for _, position, count in runs) - 1 - begin < window:
        yield Part((piece.stop, piece.end), (piece.start, piece.stop))
        return
    for start, position, count in runs:
        seeing = min(count, stop - 1 + window - position)  # the later tokens see nothing of the piece
        for row in range(0, seeing, ROWS):
            rows = min(ROWS, seeing - row)
            low = max(begin, position + row - window + 1)
            sees_all = position + row + rows - 1 - low < window
            band = None if sees_all else (rows, stop - low, position + row - low, window, False)
            yield Part((start + row, start + row + rows), (low - shift, piece.stop), band=band)


def _heads_first(x: torch.Tensor, place: tuple[int, int], length: int | None) -> torch.Tensor:
    """View the sequences of one length in a range, (n * length, H, ...), as (n, H, length, ...)."""
    start, stop = place
    return x[start:stop].unflatten(0, (-1, length or stop - start)).transpose(1, 2)


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
            rows = slice(*part.queries)
            other, lse_other = (x[0].transpose(0, 1) for x in attend(part))
            lse_own = lse[rows].clone()
            lse[rows] = torch.logaddexp(lse_own, lse_other)
            share, share_other = ((x - lse[rows]).exp().unsqueeze(-1) for x in (lse_own, lse_other))
            out[rows] = out[rows] * share + other * share_other
        out = out.to(query.dtype)
        ctx.layout, ctx.window, ctx.scale = layout, window, scale
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        query, key, value, out, lse = ctx.saved_tensors
        gradients = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
        for part in (part for group in _plan(ctx.layout, ctx.window) for part in group):
            places = part.queries, part.keys, part.keys
            inputs = [_heads_first(x, place, part.length) for x, place in zip((query, key, value), places, strict=True)]
            upstream, *results = (_heads_first(x, part.queries, part.length) for x in (dout, out, lse))
            added = _backward(upstream, *inputs, *results, 0.0, part.is_causal, attn_mask=_mask(part, lse), scale=ctx.scale)
            for total, gradient, place in zip(gradients, added, places, strict=True):
                _heads_first(total, place, part.length).add_(gradient)
        return *gradients, None, None, None


def run(query, key, value, layout, window, scale):
    return _Parts.apply(query, key, value, layout, window, scale)
