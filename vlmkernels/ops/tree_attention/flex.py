"""Tree attention by FlexAttention: the layout becomes a block mask, and one compiled kernel serves all layouts.

https://pytorch.org/docs/stable/nn.attention.flex_attention.html
"""

from bisect import bisect_left
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import pairwise

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from vlmkernels.ops.tree_attention.layout import TreeLayout

BLOCK = 128
PARTIAL, FULL = 1, 2
Range = tuple[int, int]  # (start, stop) in tokens of the pack


def unsupported(query: torch.Tensor, layout: TreeLayout | None = None, window: int | None = None) -> str | None:
    if query.device.type == "cpu" and query.requires_grad and torch.is_grad_enabled():
        return "FlexAttention has no backward pass on the CPU"
    if query.device.type == "cuda" and query.shape[-1] < 16:
        return f"FlexAttention supports head dimensions of at least 16 on CUDA, got {query.shape[-1]}"
    return None


@cache
def _compiled():
    # fullgraph raises at the recompile limit. Without it FlexAttention would then run eagerly, over all pairs of tokens.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _block_kinds(layout: TreeLayout, window: int | None) -> torch.Tensor:
    """Return (blocks, blocks) int8 on the CPU: whether a block of queries sees a block of keys.

    FULL: every query sees every key; 0: no query sees any key; PARTIAL: otherwise. It is computed from the lengths, without the
    (N, N) mask.
    """
    spans_of = {span: spans for spans in layout.blocks for span in spans}
    bounds = sorted({token for span in layout.bidirectional for token in span})
    layout = layout.condensed
    num = layout.num_tokens
    blocks = -(-num // BLOCK)
    seen, full = torch.zeros(blocks, blocks, dtype=torch.bool), torch.ones(blocks, blocks, dtype=torch.bool)
    full[num // BLOCK :] = False  # the last block, if it is incomplete

    def visible(segment: int, row: int, spans: Sequence[Range]) -> list[Range]:
        """The keys that token ``row`` of ``segment``, in a block of ``spans``, sees, as joined ranges in ascending order."""
        room = num if window is None else window - 1  # keys before the token itself
        ranges = [(max(start, row + 1), stop) for start, stop in spans]
        ranges.append((max(layout.starts[segment], row - room), row + 1))
        room -= row - layout.starts[segment]
        for ancestor in layout.path(segment)[-2::-1]:
            end = layout.starts[ancestor] + layout.lengths[ancestor]
            ranges.append((max(layout.starts[ancestor], end - max(room, 0)), end))
            room -= layout.lengths[ancestor]
        joined: list[Range] = []
        for start, end in sorted(x for x in ranges if x[0] < x[1]):
            joined.append((joined.pop()[0] if joined and joined[-1][1] == start else start, end))
        return joined

    for segment, (begin, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
        end = begin + length
        cuts = {begin, end, *range(begin - begin % BLOCK + BLOCK, end, BLOCK)} if length else set()
        cuts.update(bounds[bisect_left(bounds, begin) : bisect_left(bounds, end)])
        for low, high in pairwise(sorted(cuts)):
            # All queries of the range see what its first and its last query see.
            spans = next((spans_of[span] for span in layout.bidirectional if span[0] <= low < span[1]), ())
            first, last = visible(segment, low, spans), visible(segment, high - 1, spans)
            for start, stop in (*first, *last, (low, high)):
                seen[low // BLOCK, start // BLOCK : -(-stop // BLOCK)] = True
            whole = torch.zeros(blocks, dtype=torch.bool)
            for start, stop in _intersection(first, last):
                whole[-(-start // BLOCK) : max(stop // BLOCK, -(-start // BLOCK))] = True
            full[low // BLOCK] &= whole
    return seen.to(torch.int8) * PARTIAL + (seen & full)


def _intersection(ranges: list[Range], others: list[Range]) -> list[Range]:
    both = ((max(a, c), min(b, d)) for a, b in ranges for c, d in others)
    return [(start, stop) for start, stop in both if start < stop]


def _block_mask_of(kinds: torch.Tensor, mask_mod, num: int) -> BlockMask:
    def ordered(kind: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return, for each row, the number of blocks of this kind, and the indices of all blocks, those of this kind first."""
        chosen = (kinds == kind)[None, None].to(torch.int32)
        return chosen.sum(-1, dtype=torch.int32), chosen.argsort(dim=-1, descending=True, stable=True).to(torch.int32)

    return BlockMask.from_kv_blocks(
        *ordered(PARTIAL), *ordered(FULL), BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(num, num)
    )


@lru_cache(maxsize=4)  # all layers of a pass have the same layouts
@torch.inference_mode(False)  # a later pass may save the mask for its backward pass
def _block_mask(layout: TreeLayout, window: int | None, device: torch.device) -> BlockMask:
    def upload(x: torch.Tensor) -> torch.Tensor:
        return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)

    end, block, position = (upload(x.clone()) for x in layout.tokens)  # clones: a view would be compiled for its base

    def is_before(b, h, i, j):
        return (j <= i) & (i < end[j])

    def sees_block(b, h, i, j):
        return is_before(b, h, i, j) | ((block[i] == block[j]) & (block[i] >= 0))

    sees = sees_block if layout.bidirectional else is_before

    def sees_within_window(b, h, i, j):
        return sees(b, h, i, j) & (position[i] - position[j] < window)

    mask_mod = sees if window is None else sees_within_window
    return _block_mask_of(upload(_block_kinds(layout, window)), mask_mod, layout.num_tokens)


def run(query, key, value, layout, window, scale):
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    options = {"scale": scale, "enable_gqa": k.shape[1] != q.shape[1], "block_mask": _block_mask(layout, window, query.device)}
    if query.device.type == "cuda":
        # For short packs FlexAttention would select its decoding kernel, which does not support all head dimensions in fp32.
        out = _compiled()(q, k, v, kernel_options={"FORCE_USE_FLEX_ATTENTION": True}, **options)
    else:
        out = flex_attention(q, k, v, **options)
    return out.squeeze(0).transpose(0, 1)
