"""Tree attention on CUDA by flash attention kernels, in a few calls whose results are merged as in parts.py.

The backend "flash" uses the kernels of torch (FlashAttention-2); flash4.py uses those of FlashAttention-4 in the same calls.

Every call is one for packed sequences with cumulative lengths. The first computes the causal attention of all segments to
themselves, and one per level of the trees the attention of all tokens that follow a piece of that level (pieces.py) to the
piece. For a group, this is one call of its completions with its prefix. The tokens that follow one piece are a slice of the
pack and are not copied; those that follow several are concatenated for the call. With bidirectional spans, the first call runs
over the other pieces, and another, without causality, over the spans.

If a sliding window is shorter than a path, there is one call instead: each segment is a sequence whose keys are a copy of the
tokens of its path within the window, and its own.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch

from vlmkernels.backend import installed
from vlmkernels.ops.checks import unless_half_on_cuda
from vlmkernels.ops.tree_attention.layout import TreeLayout
from vlmkernels.ops.tree_attention.pieces import linked_pieces, pieces

Range = tuple[int, int]  # (start, stop) in tokens of the pack


def unsupported(query: torch.Tensor, layout: TreeLayout | None = None, window: int | None = None) -> str | None:
    width = query.shape[-1]
    if window is not None and layout is not None and layout.bidirectional:
        return f"supports windows without bidirectional spans, got a window of {window} and {len(layout.bidirectional)} spans"
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


class _Call(NamedTuple):
    """One call for packed sequences.

    Attributes:
        queries, keys: the tokens, as ranges of the pack or, for copies, as (n,) int64 indices.
        rows: (n,) int32, the tokens of the queries; None if the call is the first with these tokens, so that nothing is merged.
    """

    queries: tuple[Range, ...]
    keys: tuple[Range, ...] | torch.Tensor
    query_sequences: Sequences
    key_sequences: Sequences
    is_causal: bool
    rows: torch.Tensor | None


class _Draft(NamedTuple):
    """A call before its arguments are copied to the device. Sequence i has the query range i and the key ranges i."""

    queries: list[Range]
    keys: list[list[Range]]
    is_causal: bool
    is_first: bool


def _drafts(layout: TreeLayout, window: int | None) -> list[_Draft]:
    if window is not None:
        segments = [s for s, length in enumerate(layout.lengths) if length]
        own = [(layout.starts[s], layout.starts[s] + layout.lengths[s]) for s in segments]
        return [_Draft(own, [[*_tail(layout, s, window - 1), x] for s, x in zip(segments, own, strict=True)], True, True)]
    drafts = []
    all_pieces = pieces(layout)
    for is_span in (False, True):
        if own := [(piece.start, piece.stop) for piece in all_pieces if piece.is_span is is_span]:
            drafts.append(_Draft(own, [[x] for x in own], not is_span, True))
    followed = [piece for piece in all_pieces if piece.end > piece.stop]
    for level in sorted({piece.level for piece in followed}):
        chosen = [piece for piece in followed if piece.level == level]
        queries = [(piece.stop, piece.end) for piece in chosen]
        drafts.append(_Draft(queries, [[(piece.start, piece.stop)] for piece in chosen], False, False))
    if linked := linked_pieces(layout):
        queries = [(span.start, span.stop) for span, _ in linked]
        drafts.append(_Draft(queries, [[(x.start, x.stop) for x in later] for _, later in linked], False, False))
    return drafts


def _tail(layout: TreeLayout, segment: int, count: int) -> list[Range]:
    """Return the last ``count`` tokens, or fewer, of the path before a segment."""
    ranges: list[Range] = []
    for ancestor in reversed(layout.path(segment)[:-1]):
        stop = layout.starts[ancestor] + layout.lengths[ancestor]
        start = max(layout.starts[ancestor], stop - count)
        count -= stop - start
        if stop > start:
            ranges.insert(0, (start, stop))
    return ranges


def _indices(ranges: Sequence[Range]) -> torch.Tensor:
    return torch.cat([torch.arange(0), *(torch.arange(*x) for x in ranges)])


@lru_cache(maxsize=16)  # all layers of a pass have the same layouts
def _plan(layout: TreeLayout, window: int | None, device: torch.device) -> tuple[_Call, ...]:
    """Build the calls on the host and copy their arguments, as one tensor, without waiting for the device."""
    drafts, parts = _drafts(layout, window), []
    for draft in drafts:
        lengths = [[b - a for a, b in draft.queries], [sum(b - a for a, b in ranges) for ranges in draft.keys]]
        parts += [torch.tensor(list(accumulate(x, initial=0))) for x in lengths]
        parts.append(torch.arange(0) if draft.is_first else _indices(draft.queries))
        copied = any(len(ranges) > 1 for ranges in draft.keys)
        parts.append(_indices([x for ranges in draft.keys for x in ranges]) if copied else torch.arange(0))
    placed = iter(_upload(parts, device))
    calls = []
    for draft in drafts:
        query_bounds, key_bounds, rows, indices = (next(placed) for _ in range(4))
        flat = tuple(x for ranges in draft.keys for x in ranges)
        calls.append(
            _Call(
                _joined(draft.queries),
                indices.long() if len(indices) else _joined(flat),
                Sequences(query_bounds, max(b - a for a, b in draft.queries)),
                Sequences(key_bounds, max(sum(b - a for a, b in ranges) for ranges in draft.keys)),
                draft.is_causal,
                None if draft.is_first else rows,
            )
        )
    return tuple(calls)


def _upload(parts: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Copy integers to the device as int32, in one tensor."""
    if not parts:
        return []
    room = [-(-len(part) // ALIGNED) * ALIGNED for part in parts]
    host = torch.cat([torch.nn.functional.pad(x, (0, size - len(x))) for x, size in zip(parts, room, strict=True)])
    host = host.to(torch.int32)
    if device.type == "cuda":
        host = host.pin_memory()
    placed = host.to(device, non_blocking=True).split(room)
    return [x[: len(part)] for x, part in zip(placed, parts, strict=True)]


def _joined(ranges: Sequence[Range]) -> tuple[Range, ...]:
    """Join neighboring ranges."""
    result: list[Range] = []
    for start, stop in ranges:
        if result and result[-1][1] == start:
            result[-1] = (result[-1][0], stop)
        else:
            result.append((start, stop))
    return tuple(result)


class Kernels(NamedTuple):
    """Flash attention over packed sequences, in one library.

    ``forward(query, key, value, queries, keys, causal, window, scale)`` returns the output (N, Hq, D) and the log-sum-exp
    (Hq, N) in fp32. ``backward(dout, query, key, value, out, lse, queries, keys, causal, window, scale)`` returns the gradients
    of query, key and value through one call, given the merged ``out`` and ``lse``. ``queries`` and ``keys`` are ``Sequences``;
    the last query of a sequence is at the place of its last key. ``window`` is None or, in causal calls, a sliding window.
    """

    forward: Callable
    backward: Callable


def _window(window: int | None) -> dict[str, int]:
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def _forward(query, key, value, queries: Sequences, keys: Sequences, causal: bool, window: int | None, scale: float):
    bounds = queries.bounds, keys.bounds, queries.longest, keys.longest
    flash = torch.ops.aten._flash_attention_forward
    out, lse, *_ = flash(query, key, value, *bounds, 0.0, causal, False, scale=scale, **_window(window))
    if lse.shape != (query.shape[1], query.shape[0]):
        raise RuntimeError(f"flash attention of torch {torch.__version__} returned a log-sum-exp of {tuple(lse.shape)}")
    return out, lse


def _backward(dout, query, key, value, out, lse, queries: Sequences, keys: Sequences, causal, window, scale):
    bounds = queries.bounds, keys.bounds, queries.longest, keys.longest
    state = lse.new_empty(0)  # of dropout; not read without
    flash = torch.ops.aten._flash_attention_backward
    return flash(dout, query, key, value, out, lse, *bounds, 0.0, causal, state, state, scale=scale, **_window(window))


KERNELS = Kernels(_forward, _backward)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """Return ``x``, or a copy if the kernels cannot read it in vectors of 16 bytes."""
    step = 16 // x.element_size()
    if x.stride(-1) == 1 and all(offset % step == 0 for offset in (x.storage_offset(), *x.stride()[:-1])):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _gather(x: torch.Tensor, tokens: tuple[Range, ...] | torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Return the tokens of ``x``; a view if they are one range."""
    if isinstance(tokens, torch.Tensor):
        return x.index_select(dim, tokens)
    if tokens == ((0, x.shape[dim]),):
        return x
    views = [x.narrow(dim, start, stop - start) for start, stop in tokens]
    return views[0] if len(views) == 1 else torch.cat(views, dim)


def _scatter_add_(x: torch.Tensor, tokens: tuple[Range, ...] | torch.Tensor, part: torch.Tensor) -> None:
    """Add ``part`` to the tokens of ``x``."""
    if isinstance(tokens, torch.Tensor):
        x.index_add_(0, tokens, part)
        return
    views = [x[start:stop] for start, stop in tokens]
    torch._foreach_add_(views, part.split([len(view) for view in views]))


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, layout, window, scale, kernels):
        from vlmkernels.ops.tree_attention.merge import merge_

        plan = _plan(layout, window, query.device)
        query, key, value = aligned(query.contiguous()), aligned(key), aligned(value)
        # Of several merges only the last may round.
        dtype = torch.float32 if sum(call.rows is not None for call in plan) > 1 else query.dtype
        out = lse = None
        for call in plan:
            q = _gather(query, call.queries)
            k, v = (_gather(x, call.keys) for x in (key, value))
            part, part_lse = kernels.forward(q, k, v, *call[2:4], call.is_causal, window, scale)
            if call.rows is not None:
                merge_(out, lse, part, part_lse, call.rows)
            elif call.queries == ((0, len(query)),):
                out, lse = part.to(dtype), part_lse
            else:
                if out is None:
                    out = torch.empty_like(query, dtype=dtype)
                    lse = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
                _assign_(out, call.queries, part, 0)
                _assign_(lse, call.queries, part_lse, 1)
        out = out.to(query.dtype)
        ctx.plan, ctx.window, ctx.scale, ctx.kernels = plan, window, scale, kernels
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        query, key, value, out, lse = ctx.saved_tensors
        dout = aligned(dout.contiguous())
        gradients: list[torch.Tensor] | None = None
        for call in ctx.plan:
            places = call.queries, call.keys, call.keys
            inputs = [_gather(x, place) for x, place in zip((query, key, value), places, strict=True)]
            upstream, result = (_gather(x, call.queries) for x in (dout, out))
            part_lse = _gather(lse, call.queries, 1).contiguous()
            arguments = (*call[2:4], call.is_causal, ctx.window, ctx.scale)
            parts = ctx.kernels.backward(upstream, *inputs, result, part_lse, *arguments)
            if gradients is None:
                if call.queries == call.keys == ((0, len(out)),):  # the whole pack
                    gradients = list(parts)
                    continue
                gradients = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
            for total, place, part in zip(gradients, places, parts, strict=True):
                _scatter_add_(total, place, part)
        return *gradients, None, None, None, None


def _assign_(x: torch.Tensor, ranges: tuple[Range, ...], part: torch.Tensor, dim: int) -> None:
    views = [x.narrow(dim, start, stop - start) for start, stop in ranges]
    for view, values in zip(views, part.split([view.shape[dim] for view in views], dim), strict=True):
        view.copy_(values)


def attend(query, key, value, layout, window, scale, kernels: Kernels):
    return _Flash.apply(query, key, value, layout, window, scale, kernels)


def run(query, key, value, layout, window, scale):
    return attend(query, key, value, layout, window, scale, KERNELS)
