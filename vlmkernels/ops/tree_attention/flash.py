"""Tree attention on CUDA by flash attention kernels, in a few calls whose results are merged as in parts.py.

The backend "flash" uses the kernels of torch (FlashAttention-2); flash4.py uses those of FlashAttention-4 in the same calls.

Every call is one for packed sequences with cumulative lengths. The first computes the causal attention of all segments to
themselves, and one per level of the trees the attention of all tokens that follow a segment of that level to the segment. For a
group, this is one call of its completions with its prefix. Tokens that follow one segment are a slice of the pack and are not
copied; those that follow several are concatenated for the call.

If a sliding window is shorter than a path, these calls are one: each segment is a sequence whose keys are a copy of the tokens
of its path within the window, and its own.

With bidirectional blocks, a last call computes the attention of their tokens to the later ones of their block: in reverse
order, the queries before the last token and the keys after the first are causal.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch

from vlmkernels.backend import installed
from vlmkernels.ops.checks import unless_half_on_cuda
from vlmkernels.ops.tree_attention.layout import TreeLayout

Range = tuple[int, int]  # (start, stop) in tokens of the pack
Tokens = tuple[Range, ...] | torch.Tensor  # ranges, or (n,) int64 indices


def unsupported(query: torch.Tensor, layout: TreeLayout | None = None, window: int | None = None) -> str | None:
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


class _Call(NamedTuple):
    """One call for packed sequences.

    Attributes:
        rows: (n,) int32, the tokens of the queries, if they are not one range.
        merges: whether the results are merged into those of earlier calls. The first call has all tokens as queries.
    """

    queries: Tokens
    keys: Tokens
    query_sequences: Sequences
    key_sequences: Sequences
    is_causal: bool
    window: int | None
    rows: torch.Tensor | None
    merges: bool


class _Draft(NamedTuple):
    """A call before its arguments are copied to the device: the tokens of each sequence, as ranges or as indices."""

    queries: list[list[Range] | torch.Tensor]
    keys: list[list[Range] | torch.Tensor]
    is_causal: bool
    window: int | None = None


def _drafts(layout: TreeLayout, window: int | None) -> list[_Draft]:
    blocks, layout = layout.blocks, layout.condensed
    segments = [s for s, length in enumerate(layout.lengths) if length]
    stops = {s: layout.starts[s] + layout.lengths[s] for s in segments}
    own = [[(layout.starts[s], stops[s])] for s in segments]
    if window is not None:
        keys = [[*_tail(layout, s, window - 1), *x] for s, x in zip(segments, own, strict=True)]
        drafts = [_Draft(own, keys, True, window)]
    else:
        drafts = [_Draft(own, own, True)]
        followed = [s for s in segments if layout.ends[s] > stops[s]]
        for level in sorted({layout.depths[s] for s in followed}):
            chosen = [s for s in followed if layout.depths[s] == level]
            queries = [[(stops[s], layout.ends[s])] for s in chosen]
            drafts.append(_Draft(queries, [[(layout.starts[s], stops[s])] for s in chosen], False))
    reverse = [torch.cat([torch.arange(*span) for span in spans]).flip(0) for spans in blocks]
    if reverse := [tokens for tokens in reverse if len(tokens) > 1]:
        drafts.append(_Draft([x[1:] for x in reverse], [x[:-1] for x in reverse], True))
    return drafts


def _tail(layout: TreeLayout, segment: int, count: int) -> list[Range]:
    """Return the last ``count`` tokens, or fewer, of the path before a segment."""
    ranges: list[Range] = []
    for ancestor in layout.path(segment)[-2::-1]:
        stop = layout.starts[ancestor] + layout.lengths[ancestor]
        start = max(layout.starts[ancestor], stop - count)
        count -= stop - start
        if stop > start:
            ranges.insert(0, (start, stop))
    return ranges


def _indices(tokens: list[Range] | torch.Tensor) -> torch.Tensor:
    return tokens if isinstance(tokens, torch.Tensor) else torch.cat([torch.arange(*x) for x in tokens])


@lru_cache(maxsize=16)  # all layers of a pass have the same layouts
def _plan(layout: TreeLayout, window: int | None, device: torch.device) -> tuple[_Call, ...]:
    """Build the calls on the host and copy their arguments, as one tensor, without waiting for the device."""
    drafts, lengths = _drafts(layout, window), []
    parts, contiguous = [], []
    nothing = torch.arange(0)
    for draft in drafts:
        for sequences in (draft.queries, draft.keys):
            sizes = [len(x) if isinstance(x, torch.Tensor) else sum(b - a for a, b in x) for x in sequences]
            lengths.append(max(sizes))
            is_ranges = all(not isinstance(x, torch.Tensor) and len(x) == 1 for x in sequences)
            contiguous.append(_joined([x[0] for x in sequences]) if is_ranges else None)
            parts.append(torch.tensor(list(accumulate(sizes, initial=0))))
            # The rows of merged queries are needed if there are several ranges, indices of other tokens always.
            is_one = is_ranges and (sequences is draft.keys or len(contiguous[-1]) == 1)
            parts.append(nothing if is_one else torch.cat([_indices(x) for x in sequences]))
    placed = _upload(parts, device)
    calls = []
    for number, draft in enumerate(drafts):
        query_bounds, rows, key_bounds, key_indices = placed[4 * number : 4 * number + 4]
        queries, keys = contiguous[2 * number : 2 * number + 2]
        calls.append(
            _Call(
                rows.long() if queries is None else queries,
                key_indices.long() if keys is None else keys,
                Sequences(query_bounds, lengths[2 * number]),
                Sequences(key_bounds, lengths[2 * number + 1]),
                draft.is_causal,
                draft.window,
                rows if len(rows) else None,
                number > 0,
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


def _gather(x: torch.Tensor, tokens: Tokens, dim: int = 0) -> torch.Tensor:
    """Return the tokens of ``x``; a view if they are one range."""
    if isinstance(tokens, torch.Tensor):
        return x.index_select(dim, tokens)
    if tokens == ((0, x.shape[dim]),):
        return x
    views = [x.narrow(dim, start, stop - start) for start, stop in tokens]
    return views[0] if len(views) == 1 else torch.cat(views, dim)


def _scatter_add_(x: torch.Tensor, tokens: Tokens, part: torch.Tensor) -> None:
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
        for call in plan:
            q = _gather(query, call.queries)
            k, v = (_gather(x, call.keys) for x in (key, value))
            part, part_lse = kernels.forward(q, k, v, *call[2:6], scale)
            if not call.merges:
                # Of several merges only the last may round.
                out, lse = part.to(torch.float32) if len(plan) > 2 else part, part_lse
            elif call.rows is not None:
                merge_(out, lse, part, part_lse, call.rows)
            else:
                merge_(_gather(out, call.queries), _gather(lse, call.queries, 1), part, part_lse)
        out = out.to(query.dtype)
        ctx.plan, ctx.scale, ctx.kernels = plan, scale, kernels
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
            parts = ctx.kernels.backward(upstream, *inputs, result, part_lse, *call[2:6], ctx.scale)
            if gradients is None:  # sums of more than two parts are rounded once
                dtype = torch.float32 if len(ctx.plan) > 2 else query.dtype
                if isinstance(call.keys, tuple):  # the whole pack
                    gradients = [part.to(dtype) for part in parts]
                    continue
                inputs = query, key, value
                gradients = [torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in inputs]
            for total, place, part in zip(gradients, places, parts, strict=True):
                _scatter_add_(total, place, part.to(dtype))
        return *(x.to(query.dtype) for x in gradients), None, None, None, None


def attend(query, key, value, layout, window, scale, kernels: Kernels):
    return _Flash.apply(query, key, value, layout, window, scale, kernels)


def run(query, key, value, layout, window, scale):
    return attend(query, key, value, layout, window, scale, KERNELS)
