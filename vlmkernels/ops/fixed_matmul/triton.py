"""fixed_matmul in Triton: one tile configuration for all sizes, and no split of the sums."""

import torch
import triton
import triton.language as tl

from vlmkernels.ops.launch import unsupported_dtype

BLOCK_M, BLOCK_N, BLOCK_K = 64, 128, 32
NUM_WARPS, NUM_STAGES = 4, 3


def unsupported(a: torch.Tensor) -> str | None:
    return unsupported_dtype(a)


@triton.jit(do_not_specialize=["M"])
def fixed_matmul_kernel(
    a_ptr,  # (M, K), contiguous
    b_ptr,  # (K, N)
    bias_ptr,  # (N,) or None
    out_ptr,  # (M, N), contiguous
    M,
    N,
    K,
    stride_b_k,
    stride_b_n,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (M / BLOCK_M, N / BLOCK_N): out = a b + bias, with sums in fp32 over blocks of K in ascending order."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, column_mask = rows < M, columns < N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + rows[:, None] * K + k[None, :], mask=row_mask[:, None] & (k < K)[None, :], other=0.0)
        b_ptrs = b_ptr + k[:, None].to(tl.int64) * stride_b_k + columns[None, :] * stride_b_n
        b = tl.load(b_ptrs, mask=(k < K)[:, None] & column_mask[None, :], other=0.0)
        if UPCAST:  # the interpreter multiplies 16-bit operands wrongly
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + rows[:, None] * N + columns[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


def run(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    a = a.contiguous()
    if a.data_ptr() % 16:
        a = a.clone()  # Triton compiles another kernel for another alignment
    out = torch.empty(len(a), b.shape[1], dtype=out_dtype, device=a.device)
    if not out.numel():
        return out
    grid = (triton.cdiv(len(a), BLOCK_M), triton.cdiv(b.shape[1], BLOCK_N))
    with torch.cuda.device_of(a):
        fixed_matmul_kernel[grid](
            a,
            b,
            bias,
            out,
            len(a),
            *b.shape[::-1],
            *b.stride(),
            UPCAST=triton.knobs.runtime.interpret,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
        )
    return out
