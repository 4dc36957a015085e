"""decode_attention in Triton. A program reads a part of a segment once, for one key head and up to BLOCK_M rows.

A row is a query head of a slot. The slots that read a segment are neighbors in ``order``; every SLOTS-th of them starts a tile.
The grid follows the shapes of the buffers: programs without a tile, and parts beyond the length of their segment, end at once.
A part gives (m, norm, acc) of its rows, with s_j = q . k_j scale log2(e):

m = max s_j, norm = sum 2^(s_j - m), acc = sum 2^(s_j - m) v_j. The result of a row merges its parts: acc / norm.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vlmkernels.ops.decode_attention.inputs import part_size
from vlmkernels.ops.launch import unsupported_dtype
from vlmkernels.ops.layout import unsupported_last_axis

MAX_WIDTH = 256


class Blocks(NamedTuple):
    """The block sizes of ``decode_parts_kernel``. tl.dot needs 16 at least."""

    rows: int  # of a tile, at most
    keys: int
    width: int  # features that a product sums over: products without tensor cores hold their operands in registers


# By the bytes of an element. None has been tuned on a GPU; they fit in 96 KiB of shared memory.
BLOCKS = {2: Blocks(32, 64, MAX_WIDTH), 4: Blocks(16, 16, 16)}
WIDE = Blocks(32, 32, MAX_WIDTH)  # 16-bit heads of more than 128 features
NUM_WARPS = 4
NUM_STAGES = 2

INTERPRETED = triton.knobs.runtime.interpret
LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the maximum starts at a finite value: -inf - LOWEST is -inf, not NaN


def unsupported(query: torch.Tensor, *tensors: torch.Tensor) -> str | None:
    reasons = [unsupported_dtype(x) or unsupported_last_axis(x) for x in (query, *tensors)]
    if (width := max(x.shape[-1] for x in (query, *tensors))) > MAX_WIDTH:
        reasons.append(f"supports head dimensions up to {MAX_WIDTH}, got {width}")
    return next(filter(None, reasons), None)


@triton.jit(do_not_specialize=["S", "N", "capacity"])
def decode_lengths_kernel(
    lengths_ptr,  # (N,)
    segment_ptr,  # (S,) or None: slot s reads segment s
    held_ptr,  # (S,) out: the tokens that slot s reads at this level, its new one included; -1: out of bounds
    S,
    N,
    capacity,
    APPENDS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Grid (cdiv(S, BLOCK_S))."""
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    segment = s if segment_ptr is None else tl.load(segment_ptr + s, mask=s < S, other=-1)
    exists = (segment >= 0) & (segment < N) & (s < S)
    length = tl.load(lengths_ptr + segment, mask=exists, other=0)
    held = length + APPENDS
    held = tl.where(exists, tl.where((length >= 0) & (held <= capacity), held, -1), tl.where(segment == -1, 0, -1))
    tl.store(held_ptr + s, held, mask=s < S)


@triton.jit
def hidden_tokens(held_ptr, slot, mask, S, window, LEVEL: tl.constexpr, LEVELS: tl.constexpr):
    """The number of tokens at the start of a level that are outside of the window of each slot."""
    hidden = 0 * slot - window
    for level in tl.static_range(LEVELS):
        held = tl.load(held_ptr + level * S + slot, mask=mask, other=0)
        hidden += tl.where(held > 0, held, 0)
    for level in tl.static_range(LEVEL):
        held = tl.load(held_ptr + level * S + slot, mask=mask, other=0)
        hidden -= tl.where(held > 0, held, 0)
    return tl.where(hidden > 0, hidden, 0)


@triton.jit
def add_scores(s, m, norm):
    """The new maximum, the shares 2^(s - m), their sum and the factor of earlier sums."""
    top = tl.maximum(m, tl.max(s, 1))
    shares = tl.exp2(s - top[:, None])
    alpha = tl.exp2(m - top)
    return top, shares, norm * alpha + tl.sum(shares, 1), alpha


@triton.jit(do_not_specialize=["S", "parts", "first_part", "num_pages", "window", "part_size"])
def decode_parts_kernel(
    query_ptr,  # (S, Hq, D)
    key_ptr,  # (N, Hkv, capacity, D), or with a table (num_pages, Hkv, page_size, D)
    value_ptr,  # the same with DV
    new_key_ptr,  # (S, Hkv, D) or None
    new_value_ptr,  # (S, Hkv, DV)
    held_ptr,  # (LEVELS, S)
    segment_ptr,  # (S,) or None
    order_ptr,  # (S,) or None: a tile per slot
    rank_ptr,  # (S,)
    table_ptr,  # (N, max_pages) or None
    acc_ptr,  # (S, Hq, parts, DV) out
    sums_ptr,  # (S, Hq, parts, 2) out: m, l
    S,
    parts,
    first_part,  # of this level
    num_pages,
    page_size,
    query_stride_s,
    query_stride_h,
    key_stride_n,
    key_stride_h,
    key_stride_l,
    value_stride_n,
    value_stride_h,
    value_stride_l,
    new_key_stride_s,
    new_key_stride_h,
    new_value_stride_s,
    new_value_stride_h,
    table_stride,
    part_size,
    window,
    scale,
    LEVEL: tl.constexpr,
    LEVELS: tl.constexpr,
    WINDOW: tl.constexpr,  # whether there is one
    D: tl.constexpr,
    DV: tl.constexpr,
    SHARED: tl.constexpr,  # query heads of a key head
    HEADS: tl.constexpr,  # those of a tile
    SLOTS: tl.constexpr,  # of a tile
    WIDEN: tl.constexpr,  # multiply in fp32, for the interpreter
    BLOCK_M: tl.constexpr,  # >= HEADS SLOTS
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CHUNK: tl.constexpr,  # of the features, for a product
):
    """Grid (S, Hkv cdiv(SHARED, HEADS), parts of the level)."""
    i = tl.program_id(0)
    head_tiles: tl.constexpr = (SHARED + HEADS - 1) // HEADS
    h = (tl.program_id(1) // head_tiles).to(tl.int64)
    part = tl.program_id(2)
    rank = 0
    if order_ptr is not None:
        rank = tl.load(rank_ptr + i)
        if (rank < 0) | (rank % SLOTS != 0):
            return
    first = i if order_ptr is None else tl.load(order_ptr + i)
    held = tl.load(held_ptr + LEVEL * S + first)
    stored = held if new_key_ptr is None else held - 1  # tokens in the buffers
    if (held <= 0) | (part * part_size >= held):
        return
    segment = first if segment_ptr is None else tl.load(segment_ptr + first)
    row = tl.arange(0, BLOCK_M)
    member = i + row // HEADS
    within = (tl.program_id(1) % head_tiles) * HEADS + row % HEADS
    valid = (member < S) & (row < HEADS * SLOTS) & (within < SHARED)
    if order_ptr is not None:
        valid = valid & (tl.load(rank_ptr + member, mask=valid, other=-1) == rank + row // HEADS)
    slot = member if order_ptr is None else tl.load(order_ptr + member, mask=valid, other=0)
    head = h * SHARED + within
    begin = 0 * slot
    if WINDOW:
        begin = hidden_tokens(held_ptr, slot, valid, S, window, LEVEL, LEVELS)
    start = tl.maximum(tl.min(tl.where(valid, begin, held), 0) // BLOCK_N * BLOCK_N, part * part_size)
    end = tl.minimum(stored, part * part_size + part_size)

    d = tl.arange(0, BLOCK_D)
    c = tl.arange(0, BLOCK_DV)
    q_row = query_ptr + slot.to(tl.int64) * query_stride_s + head * query_stride_h
    q = tl.load(q_row[:, None] + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0)
    base = segment.to(tl.int64) if table_ptr is None else 0
    k_ptr = key_ptr + base * key_stride_n + h * key_stride_h
    v_ptr = value_ptr + base * value_stride_n + h * value_stride_h
    m = tl.full((BLOCK_M,), LOWEST, tl.float32)
    norm = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    for at in range(start, end, BLOCK_N):
        j = at + tl.arange(0, BLOCK_N)
        inside = j < end
        if table_ptr is None:
            k_row = j.to(tl.int64) * key_stride_l
            v_row = j.to(tl.int64) * value_stride_l
        else:
            page = tl.load(table_ptr + segment.to(tl.int64) * table_stride + j // page_size, mask=inside, other=0)
            lost = (page < 0) | (page >= num_pages)
            inside = inside & (lost == 0)
            page = tl.where(inside, page, 0).to(tl.int64)
            k_row = page * key_stride_n + (j % page_size).to(tl.int64) * key_stride_l
            v_row = page * value_stride_n + (j % page_size).to(tl.int64) * value_stride_l
        v = tl.load(v_ptr + v_row[:, None] + c[None, :], mask=inside[:, None] & (c < DV)[None, :], other=0.0)
        s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for skipped in tl.static_range(0, BLOCK_D, CHUNK):
            f = skipped + tl.arange(0, CHUNK)
            k = tl.load(k_ptr + k_row[None, :] + f[:, None], mask=inside[None, :] & (f < D)[:, None], other=0.0)
            if CHUNK == BLOCK_D:
                x = q
            else:
                x = tl.load(q_row[:, None] + f[None, :], mask=valid[:, None] & (f < D)[None, :], other=0.0)
            if WIDEN:
                x = x.to(tl.float32)
                k = k.to(tl.float32)
            s = tl.dot(x, k, s, input_precision="ieee")
        s *= scale
        seen = (j < end)[None, :]
        if WINDOW:
            seen = seen & (j[None, :] >= begin[:, None])
        if table_ptr is not None:
            s = tl.where(lost[None, :], float("nan"), s)
        s = tl.where(seen, s, -float("inf"))
        m, shares, norm, alpha = add_scores(s, m, norm)
        shares = shares.to(v.dtype)
        if WIDEN:
            shares = shares.to(tl.float32)
            v = v.to(tl.float32)
        acc = tl.dot(shares, v, acc * alpha[:, None], input_precision="ieee")

    if new_key_ptr is not None:
        if stored // part_size == part:  # the tile has one slot, whose new token is here
            s64 = first.to(tl.int64)
            k = tl.load(new_key_ptr + s64 * new_key_stride_s + h * new_key_stride_h + d, mask=d < D, other=0.0)
            v = tl.load(new_value_ptr + s64 * new_value_stride_s + h * new_value_stride_h + c, mask=c < DV, other=0.0)
            s = (tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scale)[:, None]
            place = stored
            exists = True
            if table_ptr is not None:
                page = tl.load(table_ptr + segment.to(tl.int64) * table_stride + stored // page_size)
                exists = (page >= 0) & (page < num_pages)
                k_ptr += page.to(tl.int64) * key_stride_n
                v_ptr += page.to(tl.int64) * value_stride_n
                place = stored % page_size
                s = tl.where(exists, s, float("nan"))
            m, shares, norm, alpha = add_scores(s, m, norm)
            acc = acc * alpha[:, None] + shares * v.to(tl.float32)[None, :]
            if tl.program_id(1) % head_tiles == 0:
                tl.store(k_ptr + place.to(tl.int64) * key_stride_l + d, k, mask=(d < D) & exists)
                tl.store(v_ptr + place.to(tl.int64) * value_stride_l + c, v, mask=(c < DV) & exists)

    out = (slot.to(tl.int64) * tl.num_programs(1) // head_tiles * SHARED + head) * parts + first_part + part
    tl.store(acc_ptr + out[:, None] * DV + c[None, :], acc, mask=valid[:, None] & (c < DV)[None, :])
    tl.store(sums_ptr + 2 * out, m, mask=valid)
    tl.store(sums_ptr + 2 * out + 1, norm, mask=valid)


@triton.jit(do_not_specialize=["S", "parts", "window", "part_size"])
def decode_merge_kernel(
    held_ptr,  # (LEVELS, S)
    acc_ptr,  # (S, Hq, parts, DV)
    sums_ptr,  # (S, Hq, parts, 2)
    out_ptr,  # (S, Hq, DV)
    lse_ptr,  # (S, Hq)
    S,
    heads,
    parts,
    part_size,
    window,
    LEVELS: tl.constexpr,
    WINDOW: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Grid (S Hq): merge the parts of a row in order."""
    row = tl.program_id(0).to(tl.int64)
    slot = (row // heads).to(tl.int32)
    c = tl.arange(0, BLOCK_DV)
    m = LOWEST + tl.zeros((), tl.float32)
    norm = tl.zeros((), tl.float32)
    acc = tl.zeros((BLOCK_DV,), tl.float32)
    for level in tl.static_range(LEVELS):
        held = tl.load(held_ptr + level * S + slot)
        begin = 0
        if WINDOW:
            begin = hidden_tokens(held_ptr, slot, slot < S, S, window, level, LEVELS)
        norm = tl.where(held < 0, float("nan"), norm)
        for part in range(begin // part_size, tl.cdiv(held, part_size)):
            at = row * parts + level * (parts // LEVELS) + part
            other = tl.load(sums_ptr + 2 * at)
            top = tl.maximum(m, other)
            alpha = tl.exp2(m - top)
            share = tl.exp2(other - top)
            norm = norm * alpha + tl.load(sums_ptr + 2 * at + 1) * share
            acc = acc * alpha + tl.load(acc_ptr + at * DV + c, mask=c < DV, other=0.0) * share
            m = top
    total = tl.where(norm == 0.0, 1.0, norm)
    tl.store(out_ptr + row * DV + c, (acc / total).to(out_ptr.dtype.element_ty), mask=c < DV)
    tl.store(lse_ptr + row, tl.where(norm == 0.0, -float("inf"), (m + tl.log2(total)) * LN2))


def fwd(query, key, value, levels, window, scale, out, lse):
    slots, heads, width = query.shape
    value_width, key_heads = out.shape[2], levels[0].key.shape[1]
    part = max(map(part_size, levels))
    most_parts = max(triton.cdiv(level.capacity, part) for level in levels)
    parts = len(levels) * most_parts
    held = torch.empty(len(levels), slots, dtype=torch.int32, device=query.device)
    acc = lse.new_empty(slots, heads, parts, value_width)
    sums = lse.new_empty(slots, heads, parts, 2)
    shared = heads // key_heads
    block_d, block_dv = (max(16, triton.next_power_of_2(x)) for x in (width, value_width))
    blocks = WIDE if query.element_size() == 2 and max(block_d, block_dv) > 128 else BLOCKS[query.element_size()]
    few = min(shared, blocks.rows)  # heads of a tile
    with torch.cuda.device_of(query):
        for index, level in enumerate(levels):
            decode_lengths_kernel[(triton.cdiv(slots, 128),)](
                level.lengths.contiguous(),
                None if level.segment is None else level.segment.contiguous(),
                held[index],
                slots,
                level.num_segments,
                level.capacity,
                APPENDS=key is not None and index == len(levels) - 1,
                BLOCK_S=128,
            )
        for index, level in enumerate(levels):
            appends = key is not None and index == len(levels) - 1
            level_parts = triton.cdiv(level.capacity, part)
            if not level_parts or not level.num_segments:
                continue
            tiled = level.segment is not None and not appends
            level = level.grouped() if tiled else level
            # Not fewer for few slots: results would depend on their number.
            together = max(1, blocks.rows // few) if tiled else 1
            table = level.block_table
            decode_parts_kernel[(slots, key_heads * triton.cdiv(shared, few), level_parts)](
                query,
                level.key,
                level.value,
                key if appends else None,
                value if appends else None,
                held,
                None if level.segment is None else level.segment.contiguous(),
                level.order if tiled else None,
                level.rank if tiled else None,
                None if table is None else table.contiguous(),
                acc,
                sums,
                slots,
                parts,
                index * most_parts,
                len(level.key),
                level.key.shape[2],
                *query.stride()[:2],
                *level.key.stride()[:3],
                *level.value.stride()[:3],
                *(key.stride()[:2] if appends else (0, 0)),
                *(value.stride()[:2] if appends else (0, 0)),
                0 if table is None else table.shape[1],
                part,
                window or 0,
                scale * LOG2E,
                LEVEL=index,
                LEVELS=len(levels),
                WINDOW=window is not None,
                D=width,
                DV=value_width,
                SHARED=shared,
                HEADS=few,
                SLOTS=together,
                WIDEN=INTERPRETED,
                BLOCK_M=max(16, triton.next_power_of_2(few * together)),
                BLOCK_N=blocks.keys,
                BLOCK_D=block_d,
                CHUNK=min(blocks.width, block_d),
                BLOCK_DV=block_dv,
                num_warps=NUM_WARPS,
                num_stages=NUM_STAGES,
            )
        decode_merge_kernel[(slots * heads,)](
            held,
            acc,
            sums,
            out,
            lse,
            slots,
            heads,
            parts,
            part,
            window or 0,
            LEVELS=len(levels),
            WINDOW=window is not None,
            DV=value_width,
            BLOCK_DV=triton.next_power_of_2(value_width),
            num_warps=1,
        )
