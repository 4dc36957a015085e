"""Merge two parts of an attention in place, in one pass over the outputs, in Triton."""

import torch
import triton
import triton.language as tl

BLOCK_N = 16
NUM_WARPS = 4


@triton.jit(do_not_specialize=["num_rows"])
def merge_kernel(
    out_ptr,  # (N, H, D)
    lse_ptr,  # (H, N)
    part_ptr,  # (num_rows, H, D)
    part_lse_ptr,  # (H, num_rows)
    rows_ptr,  # (num_rows,)
    num_rows,
    out_stride_n,
    out_stride_h,
    lse_stride_h,
    part_stride_n,
    part_stride_h,
    part_lse_stride_h,
    D: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (cdiv(num_rows, BLOCK_N), H)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)[None, :]
    valid = n < num_rows
    mask = valid[:, None] & (d < D)
    row = n.to(tl.int64)
    if HAS_ROWS:
        row = tl.load(rows_ptr + n, mask=valid, other=0).to(tl.int64)
    to_lse_ptr = lse_ptr + h * lse_stride_h + row
    lse = tl.load(to_lse_ptr, mask=valid, other=0).to(tl.float32)
    part_lse = tl.load(part_lse_ptr + h * part_lse_stride_h + n, mask=valid, other=0).to(tl.float32)
    largest = tl.maximum(lse, part_lse)
    share = tl.exp(lse - largest)
    part_share = tl.exp(part_lse - largest)
    total = share + part_share
    to_out_ptr = out_ptr + row[:, None] * out_stride_n + h * out_stride_h + d
    from_part_ptr = part_ptr + n.to(tl.int64)[:, None] * part_stride_n + h * part_stride_h + d
    out = tl.load(to_out_ptr, mask=mask).to(tl.float32)
    part = tl.load(from_part_ptr, mask=mask).to(tl.float32)
    merged = out * (share / total)[:, None] + part * (part_share / total)[:, None]
    tl.store(to_out_ptr, merged.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(to_lse_ptr, (largest + tl.log(total)).to(lse_ptr.dtype.element_ty), mask=valid)


def merge_(
    out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor, rows: torch.Tensor | None = None
) -> None:
    """Merge a part of an attention into ``rows`` of its output and log-sum-exp, in place.

    Equivalent to::

        merged = torch.logaddexp(lse[:, rows], part_lse)
        shares = [(x - merged).exp().T.unsqueeze(-1) for x in (lse[:, rows], part_lse)]
        out[rows] = (out[rows] * shares[0] + part * shares[1]).to(out.dtype)
        lse[:, rows] = merged

    Args:
        out: (N, H, D). The last axis of every argument is contiguous.
        lse: (H, N).
        part: (R, H, D).
        part_lse: (H, R).
        rows: (R,) integers without repeats. Default: all rows, then R = N.
    """
    num_rows, heads, width = part.shape
    with torch.cuda.device_of(out):
        merge_kernel[(triton.cdiv(num_rows, BLOCK_N), heads)](
            out,
            lse,
            part,
            part_lse,
            rows,
            num_rows,
            *out.stride()[:2],
            lse.stride(0),
            *part.stride()[:2],
            part_lse.stride(0),
            D=width,
            HAS_ROWS=rows is not None,
            BLOCK_N=BLOCK_N,
            BLOCK_D=triton.next_power_of_2(width),
            num_warps=NUM_WARPS,
        )
