"""sample_logps in Triton: the sums of blocks of tokens, and one program per row that draws from them. The formulas are in
csrc/common/sample_logps.h.

With c = log2(e) / temperature, e_v is 2^((s_v - max s) c) for the score s_v of token v, or 0 below 2^-126.
"""

import torch
import triton
import triton.language as tl

from vlmkernels.ops.launch import unsupported_dtype
from vlmkernels.ops.layout import unsupported_last_axis
from vlmkernels.ops.sample_logps.inputs import Filters, Inputs, SampledTokens

BLOCK = tl.constexpr(1024)  # tokens in a block
TILE_BLOCKS = 2  # blocks of a program of the first kernel, and of a step of the second
SUMS_WARPS, DRAW_WARPS = 4, 8
MAX_BLOCKS = 4096  # in a row

LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the least finite fp32
# The low bits of a score that are 0 if it is a logit of this dtype.
ZERO_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}


def unsupported(logits: torch.Tensor) -> str | None:
    if logits.shape[1] > MAX_BLOCKS * BLOCK.value:
        return f"supports at most {MAX_BLOCKS * BLOCK.value} tokens in the vocabulary, got {logits.shape[1]}"
    return unsupported_dtype(logits) or unsupported_last_axis(logits)


@triton.jit
def load_logits(x_ptr, v, V):
    return tl.load(x_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)


@triton.jit
def scores_of(x, v, row):
    """The scores of the tokens v from their logits x. row: (logits, seen, banned, V, penalty, 1 / penalty)."""
    seen_ptr, banned_ptr, V, penalty, inverse_penalty = row[1], row[2], row[3], row[4], row[5]
    score = x
    if seen_ptr is not None:
        seen = tl.load(seen_ptr + v, mask=v < V, other=0) != 0
        # x / penalty, rounded correctly; an IEEE division would need more registers.
        inverse = tl.full(x.shape, inverse_penalty, tl.float32)
        divided = x * inverse
        divided = tl.fma(tl.fma(-divided, tl.full(x.shape, penalty, tl.float32), x), inverse, divided)
        score = tl.where(seen, tl.where(x < 0, x * penalty, divided), x)
    if banned_ptr is not None:
        score = tl.where(tl.load(banned_ptr + v, mask=v < V, other=0) != 0, -float("inf"), score)
    return score


@triton.jit
def load_scores(v, row):
    return scores_of(load_logits(row[0], v, row[3]), v, row)


@triton.jit
def table_of_row(banned_rows_ptr, n, num_banned):
    """The row of the table of banned tokens, and whether it exists."""
    row = n * 0 if banned_rows_ptr is None else tl.load(banned_rows_ptr + n)
    valid = (row >= 0) & (row < num_banned)
    return tl.where(valid, row, 0), valid


@triton.jit(do_not_specialize=["num_banned"])
def sample_sums_kernel(
    logits_ptr,  # (N, V)
    seen_ptr,  # (N, V) or None
    banned_ptr,  # (A, V) or None
    banned_rows_ptr,  # (N,) or None
    sums_ptr,  # (N, 5, blocks) out: the greatest score and the sum of its e; the maximum of the logits, s, sy
    V,
    stride,
    seen_stride,
    num_banned,
    blocks,
    tiles,  # cdiv(blocks, TILE_BLOCKS)
    penalty,
    inverse_penalty,
    scale,  # c
    BLOCK: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
):
    """Grid (N * tiles)."""
    n = tl.program_id(0).to(tl.int64) // tiles
    b = (tl.program_id(0) % tiles) * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    v = b[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    valid = True
    if seen_ptr is not None:
        seen_ptr += n * seen_stride
    if banned_ptr is not None:
        table, valid = table_of_row(banned_rows_ptr, n, num_banned)
        banned_ptr += table.to(tl.int64) * V
    x = load_logits(logits_ptr + n * stride, v, V)
    score = scores_of(x, v, (logits_ptr, seen_ptr, banned_ptr, V, penalty, inverse_penalty))
    m = tl.maximum(tl.max(x, 1), LOWEST)  # finite: -inf - m is -inf, not NaN
    y = (x - m[:, None]) * scale
    e = tl.exp2(y)
    s = tl.sum(e, 1)
    sy = tl.sum(e * tl.where(y < -126.0, -126.0, y), 1)
    top = tl.max(score, 1)
    score_s = s
    if (seen_ptr is not None) or (banned_ptr is not None):
        score_s = tl.sum(tl.exp2((score - tl.maximum(top, LOWEST)[:, None]) * scale), 1)
    if not valid:
        s = s * float("nan")
    out = sums_ptr + n * 5 * blocks + b
    tl.store(out, top, mask=b < blocks)
    tl.store(out + blocks, score_s, mask=b < blocks)
    tl.store(out + 2 * blocks, m, mask=b < blocks)
    tl.store(out + 3 * blocks, s, mask=b < blocks)
    tl.store(out + 4 * blocks, sy, mask=b < blocks)


@triton.jit
def e_of(score, top, scale):
    y = (score - top) * scale
    return tl.where(y < -126.0, 0.0, tl.exp2(y))


@triton.jit
def ordered(x):
    """The bits of floats as integers in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def unordered(key):
    key = key.to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def weight_from(
    row, tops_ptr, blocks, pivot, top, scale,
    MASS: tl.constexpr, BLOCK: tl.constexpr, TILE_BLOCKS: tl.constexpr,
):  # fmt: skip
    """The number of scores >= pivot, or the sum of their e."""
    total = tl.zeros((), tl.float64)
    for start in range(0, blocks, TILE_BLOCKS):
        b = start + tl.arange(0, TILE_BLOCKS)
        if tl.max(tl.load(tops_ptr + b, mask=b < blocks, other=-float("inf")), 0) >= pivot:
            score = load_scores(start * BLOCK + tl.arange(0, BLOCK * TILE_BLOCKS), row)
            weight = e_of(score, top, scale) if MASS else tl.full(score.shape, 1.0, tl.float32)
            total += tl.sum(tl.where(score >= pivot, weight, 0.0), 0).to(tl.float64)
    return total


@triton.jit
def greatest_with(
    row, tops_ptr, blocks, need, low, top, scale,
    MASS: tl.constexpr, ZERO_BITS: tl.constexpr, BLOCK: tl.constexpr, TILE_BLOCKS: tl.constexpr,
):  # fmt: skip
    """The greatest score in [low, top] with weight_from(score) >= need; low if there is none."""
    least = ordered(low) >> ZERO_BITS
    most = ordered(top) >> ZERO_BITS
    while least < most:
        middle = least + (most - least + 1) // 2
        weight = weight_from(
            row, tops_ptr, blocks, unordered(middle << ZERO_BITS), top, scale, MASS, BLOCK,
            TILE_BLOCKS,
        )  # fmt: skip
        enough = weight >= need
        least = tl.where(enough, middle, least)
        most = tl.where(enough, most, middle - 1)
    # The low bits of a negative score are ones in its key.
    key = least << ZERO_BITS
    if ZERO_BITS > 0:
        key = tl.where(key < 0, key | ((1 << ZERO_BITS) - 1), key)
    return tl.maximum(unordered(key), low)


@triton.jit(do_not_specialize=["num_banned", "top_k"])
def sample_draw_kernel(
    logits_ptr,  # (N, V)
    seen_ptr,
    banned_ptr,
    banned_rows_ptr,
    sums_ptr,  # (N, 5, blocks)
    uniform_ptr,  # (N,) fp64, or None: greedy
    ids_ptr,  # (N,) out, like the next three
    logps_ptr,
    log_kept_mass_ptr,
    entropy_ptr,
    V,
    stride,
    seen_stride,
    num_banned,
    blocks,
    penalty,
    inverse_penalty,
    temperature,
    scale,
    top_k,  # 0: all
    removable,  # 0: nothing
    min_p_distance,  # -inf: all
    FILTERED: tl.constexpr,
    ZERO_BITS: tl.constexpr,
    BLOCK_B: tl.constexpr,  # >= blocks
    BLOCK: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
):
    """Grid (N)."""
    n = tl.program_id(0).to(tl.int64)
    x_ptr = logits_ptr + n * stride
    if seen_ptr is not None:
        seen_ptr += n * seen_stride
    if banned_ptr is not None:
        table = table_of_row(banned_rows_ptr, n, num_banned)[0]
        banned_ptr += table.to(tl.int64) * V
    row = (x_ptr, seen_ptr, banned_ptr, V, penalty, inverse_penalty)
    sums_ptr += n * 5 * blocks
    b = tl.arange(0, BLOCK_B)
    there = b < blocks
    tops = tl.load(sums_ptr + b, mask=there, other=-float("inf"))
    s = tl.load(sums_ptr + blocks + b, mask=there, other=0.0)
    of_block = tl.load(sums_ptr + 2 * blocks + b, mask=there, other=LOWEST)
    full = tl.load(sums_ptr + 3 * blocks + b, mask=there, other=0.0)
    full_y = tl.load(sums_ptr + 4 * blocks + b, mask=there, other=0.0)
    top = tl.max(tops, 0)
    m = tl.max(of_block, 0)
    shift = tl.maximum((of_block - m) * scale, -126.0)
    alpha = tl.exp2(shift)
    total = tl.sum((full * alpha).to(tl.float64), 0)
    total_y = tl.sum(((full_y + full * shift) * alpha).to(tl.float64), 0)
    valid = (total < float("inf")) & (tl.sum(s, 0) < float("inf"))  # false for NaN
    possible = top > -float("inf")

    token = n * 0 - 1
    kept = tl.full((), 1.0, tl.float64)
    if valid & possible:
        i = tl.arange(0, BLOCK)
        if uniform_ptr is None:
            block = tl.min(tl.where(tops == top, b, BLOCK_B), 0)
            score = load_scores(block * BLOCK + i, row)
            token = (block * BLOCK + tl.min(tl.where(score == top, i, BLOCK), 0)).to(tl.int64)
        else:
            threshold = top * 0 - float("inf")
            kept_ties = tl.zeros((), tl.float64)
            mass = s.to(tl.float64) * e_of(tops, top, scale)
            before = tl.zeros((BLOCK_B,), tl.float64)
            if FILTERED:
                threshold = top * 0 + LOWEST
                all_mass = tl.sum(mass, 0)
                if top_k > 0:
                    threshold = greatest_with(
                        row, sums_ptr, blocks, top_k.to(tl.float64), threshold, top, scale,
                        False, ZERO_BITS, BLOCK, TILE_BLOCKS,
                    )  # fmt: skip
                    if removable > 0:
                        all_mass = weight_from(
                            row, sums_ptr, blocks, threshold, top, scale, True, BLOCK,
                            TILE_BLOCKS,
                        )  # fmt: skip
                limit = all_mass * removable
                if (removable > 0) & (top_k == 0):
                    # All tokens below this score together have less than the share that top_p removes.
                    least = top + (tl.log2(all_mass.to(tl.float32) * removable / V) - 0.01) / scale
                    threshold = tl.maximum(threshold, least)
                if removable > 0:
                    threshold = greatest_with(
                        row, sums_ptr, blocks, all_mass - limit, threshold, top, scale,
                        True, ZERO_BITS, BLOCK, TILE_BLOCKS,
                    )  # fmt: skip
                by_top_p = (removable > 0) & (top + min_p_distance <= threshold)
                threshold = tl.maximum(threshold, top + min_p_distance)
                # The sums and the ties of the blocks.
                for start in range(0, blocks, TILE_BLOCKS):
                    part = start + tl.arange(0, TILE_BLOCKS)
                    v = part[:, None] * BLOCK + i[None, :]
                    score = load_scores(v, row)
                    above = tl.sum(tl.where(score > threshold, e_of(score, top, scale), 0.0), 1)
                    equal = tl.sum((score == threshold).to(tl.float32), 1)
                    tl.store(sums_ptr + blocks + part, above, mask=part < blocks)
                    tl.store(sums_ptr + 2 * blocks + part, equal, mask=part < blocks)
                tl.debug_barrier()
                above = tl.load(sums_ptr + blocks + b, mask=there, other=0.0).to(tl.float64)
                equal = tl.load(sums_ptr + 2 * blocks + b, mask=there, other=0.0).to(tl.float64)
                each = e_of(threshold, top, scale)
                kept_ties = tl.sum(equal, 0)
                if by_top_p:
                    below = all_mass - tl.sum(above, 0) - kept_ties * each
                    removed = tl.where(each > 0, tl.floor(tl.maximum((limit - below) / each, 0.0)), kept_ties)
                    kept_ties -= tl.minimum(removed, tl.maximum(kept_ties - 1, 0.0))
                before = tl.cumsum(equal, 0) - equal
                mass = above + tl.minimum(tl.maximum(kept_ties - before, 0.0), equal) * each
            uniform = tl.load(uniform_ptr + n)
            uniform = tl.where(uniform > 0, tl.where(uniform < 1, uniform, 1.0), 0.0)  # NaN becomes 0
            kept = tl.sum(mass, 0)
            below = uniform * kept
            sums = tl.cumsum(mass, 0) - mass
            block = tl.max(tl.where((mass > 0) & (sums <= below), b, -1), 0)
            chosen = b == block
            block_mass = tl.sum(tl.where(chosen, mass, 0.0), 0)
            below -= tl.sum(tl.where(chosen, sums, 0.0), 0)

            # Within the block.
            score = load_scores(block * BLOCK + i, row)
            keep = score > threshold
            if FILTERED:
                tie = score == threshold
                rank = tl.sum(tl.where(chosen, before, 0.0), 0) + tl.cumsum(tie.to(tl.float64), 0) - 1
                keep = keep | (tie & (rank < kept_ties))
            e = tl.where(keep, e_of(score, top, scale), 0.0).to(tl.float64)
            # below is a part of block_mass; the sums are a part of the sum of e.
            sums = (tl.cumsum(e, 0) - e) * block_mass
            token = (block * BLOCK + tl.max(tl.where((e > 0) & (sums <= below * tl.sum(e, 0)), i, -1), 0)).to(tl.int64)
    nothing = float("nan")
    x = load_logits(x_ptr, tl.maximum(token, 0), V)
    score = scores_of(x, tl.maximum(token, 0), row)
    log_sum = tl.log(total.to(tl.float32))
    logp = (x - m) / temperature - log_sum
    log_kept_mass = logp
    if uniform_ptr is not None:
        log_kept_mass = logp - ((score - top) / temperature - tl.log(kept.to(tl.float32)))
    entropy = log_sum - total_y.to(tl.float32) / total.to(tl.float32) * LN2
    tl.store(ids_ptr + n, tl.where(valid & (top == -float("inf")), -2, token))
    tl.store(logps_ptr + n, tl.where(token >= 0, logp, nothing))
    tl.store(log_kept_mass_ptr + n, tl.where(token >= 0, log_kept_mass, nothing))
    tl.store(entropy_ptr + n, tl.where(token >= 0, entropy, nothing))


def fwd(inputs: Inputs, filters: Filters, outputs: SampledTokens) -> None:
    logits, uniform, seen, banned, banned_rows = inputs
    uniform, banned, banned_rows = (t if t is None else t.contiguous() for t in (uniform, banned, banned_rows))
    seen = seen if seen is None or seen.stride(1) == 1 else seen.contiguous()
    num, vocab = logits.shape
    blocks = triton.cdiv(vocab, BLOCK.value)
    tiles = triton.cdiv(blocks, TILE_BLOCKS)
    sums = outputs.logps.new_empty(num, 5, blocks)
    tensors = (logits, seen, banned, banned_rows, sums)
    layout = (vocab, logits.stride(0), 0 if seen is None else seen.stride(0), 0 if banned is None else len(banned), blocks)
    penalty, scale = filters.repetition_penalty, LOG2E / filters.temperature
    penalties = (penalty, 1 / penalty)
    options = {"BLOCK": BLOCK.value, "TILE_BLOCKS": TILE_BLOCKS}
    with torch.cuda.device_of(logits):
        sample_sums_kernel[(num * tiles,)](*tensors, *layout, tiles, *penalties, scale, **options, num_warps=SUMS_WARPS)
        sample_draw_kernel[(num,)](
            *tensors,
            uniform,
            *outputs,
            *layout,
            *penalties,
            filters.temperature,
            scale,
            filters.top_k,
            filters.removable,
            filters.min_p_distance,
            FILTERED=filters.top_k > 0 or filters.removable > 0 or filters.min_p > 0,
            ZERO_BITS=0 if seen is not None else ZERO_BITS[logits.dtype],
            BLOCK_B=triton.next_power_of_2(blocks),
            **options,
            num_warps=DRAW_WARPS,
        )
