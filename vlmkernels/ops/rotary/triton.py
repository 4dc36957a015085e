"""rotary in Triton. One program per token reads its angles once, for all heads of its query and key."""

import torch
import triton
import triton.language as tl

from vlmkernels.ops.launch import unsupported_dtype
from vlmkernels.ops.layout import unsupported_last_axis

BLOCK_H = 16
NUM_WARPS = 4


def unsupported(*tensors: torch.Tensor) -> str | None:
    reasons = (unsupported_dtype(tensor) or unsupported_last_axis(tensor) for tensor in tensors)
    return next(filter(None, reasons), None)


@triton.jit
def rotate_heads(
    x_ptr,  # (H, WIDTH), stride_h apart
    out_ptr,  # (H, WIDTH), contiguous
    heads,
    stride_h,
    cos,  # (1, BLOCK_P)
    sin,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Rotate the heads of a token, and copy the features from 2 PAIRS on."""
    pair = tl.arange(0, BLOCK_P)[None, :]
    for first_head in range(0, heads, BLOCK_H):
        head = first_head + tl.arange(0, BLOCK_H)[:, None]
        mask = (head < heads) & (pair < PAIRS)
        first_ptr = x_ptr + head.to(tl.int64) * stride_h + pair
        first = tl.load(first_ptr, mask=mask).to(tl.float32)
        second = tl.load(first_ptr + PAIRS, mask=mask).to(tl.float32)
        to_ptr = out_ptr + head * WIDTH + pair
        tl.store(to_ptr, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(to_ptr + PAIRS, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=mask)
        if 2 * PAIRS < WIDTH:
            rest = 2 * PAIRS + tl.arange(0, BLOCK_R)[None, :]
            mask = (head < heads) & (rest < WIDTH)
            x = tl.load(x_ptr + head.to(tl.int64) * stride_h + rest, mask=mask)
            tl.store(out_ptr + head * WIDTH + rest, x, mask=mask)


@triton.jit(do_not_specialize=["S"])
def rotary_kernel(
    query_ptr,  # (B, S, query_heads, WIDTH)
    key_ptr,  # (B, S, key_heads, WIDTH)
    cos_ptr,  # (B, S, PAIRS)
    sin_ptr,
    query_out_ptr,  # like query, contiguous
    key_out_ptr,
    S,
    query_heads,
    key_heads,
    query_stride_b,
    query_stride_s,
    query_stride_h,
    key_stride_b,
    key_stride_s,
    key_stride_h,
    cos_stride_b,
    cos_stride_s,
    sin_stride_b,
    sin_stride_s,
    INVERSE: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Grid (B * S): y_j = x_j cos_j - x_{j+P} sin_j, y_{j+P} = x_{j+P} cos_j + x_j sin_j, for the heads of a token."""
    n = tl.program_id(0).to(tl.int64)
    b = n // S
    s = n % S
    pair = tl.arange(0, BLOCK_P)[None, :]
    cos = tl.load(cos_ptr + b * cos_stride_b + s * cos_stride_s + pair, mask=pair < PAIRS).to(tl.float32)
    sin = tl.load(sin_ptr + b * sin_stride_b + s * sin_stride_s + pair, mask=pair < PAIRS).to(tl.float32)
    if INVERSE:
        sin = -sin
    x_ptr = query_ptr + b * query_stride_b + s * query_stride_s
    out_ptr = query_out_ptr + n * query_heads * WIDTH
    rotate_heads(x_ptr, out_ptr, query_heads, query_stride_h, cos, sin, WIDTH, PAIRS, BLOCK_H, BLOCK_P, BLOCK_R)
    x_ptr = key_ptr + b * key_stride_b + s * key_stride_s
    out_ptr = key_out_ptr + n * key_heads * WIDTH
    rotate_heads(x_ptr, out_ptr, key_heads, key_stride_h, cos, sin, WIDTH, PAIRS, BLOCK_H, BLOCK_P, BLOCK_R)


def fwd(query, key, cos, sin, inverse, heads_first, query_out, key_out):
    if heads_first:
        query, key = query.transpose(1, 2), key.transpose(1, 2)
    if query.dim() == 3:
        query, key, cos, sin = (x.unsqueeze(0) for x in (query, key, cos, sin))
    batch, tokens, heads, width = query.shape
    pairs = cos.shape[-1]
    with torch.cuda.device_of(query):
        rotary_kernel[(batch * tokens,)](
            query,
            key,
            cos,
            sin,
            query_out,
            key_out,
            tokens,
            heads,
            key.shape[2],
            *query.stride()[:3],
            *key.stride()[:3],
            *cos.stride()[:2],
            *sin.stride()[:2],
            INVERSE=inverse,
            WIDTH=width,
            PAIRS=pairs,
            BLOCK_H=BLOCK_H,
            BLOCK_P=triton.next_power_of_2(max(pairs, 1)),
            BLOCK_R=triton.next_power_of_2(max(width - 2 * pairs, 1)),
            num_warps=NUM_WARPS,
        )
