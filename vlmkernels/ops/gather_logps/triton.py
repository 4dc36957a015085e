"""gather_logps in Triton. One program per row and part of the vocabulary, so that even a few rows fill a GPU.

With c = log2(e) / temperature, y_v = (x_v - m) c and m the maximum of the logits read so far, a program accumulates
(m, s = sum 2^y, sy = sum 2^y y). Two such triples merge exactly; logp and entropy follow from the result without cancellation.
"""

import torch
import triton
import triton.language as tl

from vlmkernels.ops.gather_logps.inputs import Outputs, Results
from vlmkernels.ops.launch import unsupported_dtype
from vlmkernels.ops.layout import row_layout, unsupported_rows

BLOCK_V = 4096
NUM_WARPS = 8
MIN_SPLIT = 4 * BLOCK_V  # the smallest part of a row that pays for its own program
PROGRAMS = 1024  # rows are split until there are so many programs, which fill any GPU

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the maximum starts at a finite value: -inf - LOWEST is -inf, not NaN


def unsupported(logits: torch.Tensor) -> str | None:
    return unsupported_dtype(logits) or unsupported_rows(logits)


@triton.jit
def row_offset(n, inner, stride_outer, stride_inner):
    return (n // inner) * stride_outer + (n % inner) * stride_inner


@triton.jit
def exp2_and_exponent(y):
    """Return 2^y, and y with everything below -126 replaced by -126, so that 2^y y is 0 for y = -inf."""
    return tl.exp2(y), tl.where(y < -126.0, -126.0, y)


# Sizes that vary from batch to batch. Kernels are not recompiled for their values.
VARYING = ["N", "inner", "splits"]


@triton.jit(do_not_specialize=VARYING)
def gather_logps_fwd_kernel(
    logits_ptr,  # (N, V), see row_offset
    mask_ptr,  # (K,) or None
    rows_ptr,  # (K,) or None: result k reads row k
    partial_ptr,  # (K, splits, 3) out: m, s, sy
    N,
    V,
    inner,
    stride_outer,
    stride_inner,
    splits,
    scale,  # c
    BLOCK_V: tl.constexpr,
):
    """Grid (K * splits): the triple of one part of one row."""
    k = tl.program_id(0).to(tl.int64) // splits
    part = tl.program_id(0) % splits
    if mask_ptr is not None:
        if tl.load(mask_ptr + k) == 0:
            return
    n = k if rows_ptr is None else tl.load(rows_ptr + k)
    if (n < 0) | (n >= N):
        return
    x_ptr = logits_ptr + row_offset(n, inner, stride_outer, stride_inner)
    size = tl.cdiv(tl.cdiv(V, splits), BLOCK_V) * BLOCK_V
    start = part * size
    end = tl.minimum(start + size, V)
    offset = tl.arange(0, BLOCK_V)
    m = tl.full((), LOWEST, tl.float32)
    s = tl.zeros((BLOCK_V,), tl.float32)
    sy = tl.zeros((BLOCK_V,), tl.float32)
    for v in range(start, end, BLOCK_V):
        x = tl.load(x_ptr + v + offset, mask=v + offset < end, other=-float("inf")).to(tl.float32)
        top = tl.maximum(m, tl.max(x, 0))
        shift = tl.maximum((m - top) * scale, -126.0)
        e, y = exp2_and_exponent((x - top) * scale)
        sy = (sy + s * shift) * tl.exp2(shift) + e * y
        s = s * tl.exp2(shift) + e
        m = top
    out = partial_ptr + tl.program_id(0).to(tl.int64) * 3
    tl.store(out, m)
    tl.store(out + 1, tl.sum(s, 0))
    tl.store(out + 2, tl.sum(sy, 0))


@triton.jit(do_not_specialize=VARYING)
def gather_logps_merge_kernel(
    logits_ptr,
    targets_ptr,  # (K,)
    mask_ptr,
    rows_ptr,
    partial_ptr,  # (K, splits, 3)
    logp_ptr,  # (K,)
    entropy_ptr,  # (K,) or None
    stats_ptr,  # (K, 2): m, log sum exp((x - m) / temperature)
    N,
    V,
    inner,
    stride_outer,
    stride_inner,
    splits,
    temperature,
    scale,
    BLOCK_S: tl.constexpr,
):
    """Grid (K): merge the parts of a row and write its results."""
    k = tl.program_id(0).to(tl.int64)
    selected = True if mask_ptr is None else tl.load(mask_ptr + k) != 0
    if selected:
        i = tl.arange(0, BLOCK_S)
        part = partial_ptr + (k * splits + i) * 3
        m = tl.load(part, mask=i < splits, other=LOWEST)
        s = tl.load(part + 1, mask=i < splits, other=0.0)
        sy = tl.load(part + 2, mask=i < splits, other=0.0)
        top = tl.max(m, 0)
        shift = tl.maximum((m - top) * scale, -126.0)
        target = tl.load(targets_ptr + k)
        n = k if rows_ptr is None else tl.load(rows_ptr + k)
        valid = (target >= 0) & (target < V) & (n >= 0) & (n < N)
        # If an index is out of range, all results are NaN, and so is their gradient.
        top = tl.where(valid, top, float("nan"))
        total = tl.where(valid, tl.sum(s * tl.exp2(shift), 0), float("nan"))
        mean_y = tl.sum((sy + s * shift) * tl.exp2(shift), 0) / total
        log_sum = tl.log(total)
        x_ptr = logits_ptr + row_offset(n, inner, stride_outer, stride_inner)
        x = tl.load(x_ptr + target, mask=valid, other=0.0).to(tl.float32)
        tl.store(logp_ptr + k, (x - top) / temperature - log_sum)
        if entropy_ptr is not None:
            tl.store(entropy_ptr + k, log_sum - mean_y * LN2)
        tl.store(stats_ptr + 2 * k, top)
        tl.store(stats_ptr + 2 * k + 1, log_sum)
    else:
        tl.store(logp_ptr + k, 0.0)
        if entropy_ptr is not None:
            tl.store(entropy_ptr + k, 0.0)
        tl.store(stats_ptr + 2 * k, 0.0)
        tl.store(stats_ptr + 2 * k + 1, 0.0)


@triton.jit(do_not_specialize=["inner"])
def gather_logps_bwd_kernel(
    dlogp_ptr,  # (K,)
    targets_ptr,  # (K,)
    stats_ptr,  # (K, 2)
    dentropy_ptr,  # (K,) or None
    entropy_ptr,  # (K,) or None
    logits_ptr,  # (N, V)
    mask_ptr,  # (K,) or None
    offsets_ptr,  # (N + 1,): row n owns results [offsets[n], offsets[n + 1]); None: row k owns result k
    dlogits_ptr,  # (N, V) out; may be logits
    V,
    inner,
    stride_outer,
    stride_inner,
    grad_stride_outer,
    grad_stride_inner,
    blocks,  # cdiv(V, BLOCK_V)
    temperature,
    scale,
    BLOCK_V: tl.constexpr,
):
    """Grid (N * blocks): dx_v = (sum_k dlogp_k [v == t_k] - p_v (sum dlogp + (sum dentropy) (log p_v + H))) / temperature."""
    n = tl.program_id(0).to(tl.int64) // blocks
    v = (tl.program_id(0) % blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    if offsets_ptr is None:
        begin = n
        end = n + 1 if mask_ptr is None else n + tl.load(mask_ptr + n).to(tl.int64)
    else:
        begin = tl.load(offsets_ptr + n)
        end = tl.load(offsets_ptr + n + 1)
    dx_ptr = dlogits_ptr + row_offset(n, inner, grad_stride_outer, grad_stride_inner)
    if begin == end:
        tl.store(dx_ptr + v, tl.zeros((BLOCK_V,), dlogits_ptr.dtype.element_ty), mask=v < V)
        return
    x_ptr = logits_ptr + row_offset(n, inner, stride_outer, stride_inner)
    x = tl.load(x_ptr + v, mask=v < V, other=0.0).to(tl.float32)
    dlogp = tl.zeros((), tl.float32)
    dentropy = tl.zeros((), tl.float32)
    one_hot = tl.zeros((BLOCK_V,), tl.float32)
    for k in range(begin, end):
        g = tl.load(dlogp_ptr + k)
        dlogp += g
        one_hot += tl.where(v == tl.load(targets_ptr + k).to(tl.int32), g, 0.0)
        if dentropy_ptr is not None:
            dentropy += tl.load(dentropy_ptr + k)
    m = tl.load(stats_ptr + 2 * begin)
    log_sum = tl.load(stats_ptr + 2 * begin + 1)
    p, y = exp2_and_exponent((x - m) * scale - log_sum / LN2)
    if dentropy_ptr is not None:
        dlogp += dentropy * (y * LN2 + tl.load(entropy_ptr + begin))
    dx = (one_hot - p * dlogp) / temperature
    tl.store(dx_ptr + v, dx.to(dlogits_ptr.dtype.element_ty), mask=v < V)


def fwd(logits, targets, mask, rows, temperature: float, outputs: Outputs) -> None:
    targets, mask, rows = (t if t is None else t.contiguous() for t in (targets, mask, rows))
    num, vocab = targets.numel(), logits.shape[-1]
    splits = max(1, min(PROGRAMS // num, vocab // MIN_SPLIT))
    partial = outputs.stats.new_empty(num, splits, 3)
    layout = (logits.shape[:-1].numel(), vocab, *row_layout(logits), splits)
    scale = LOG2E.value / temperature
    with torch.cuda.device_of(logits):
        gather_logps_fwd_kernel[(num * splits,)](
            logits, mask, rows, partial, *layout, scale, BLOCK_V=BLOCK_V, num_warps=NUM_WARPS
        )
        gather_logps_merge_kernel[(num,)](
            logits,
            targets,
            mask,
            rows,
            partial,
            outputs.logp,
            outputs.entropy if outputs.entropy.numel() else None,
            outputs.stats,
            *layout,
            temperature,
            scale,
            BLOCK_S=triton.next_power_of_2(splits),
            num_warps=1,
        )


def bwd(logits, results: Results, temperature: float, out) -> None:
    results = results.contiguous()
    vocab = logits.shape[-1]
    inner, *strides = row_layout(logits)
    grad_strides = (inner * vocab, vocab) if out.is_contiguous() else strides
    blocks = triton.cdiv(vocab, BLOCK_V)
    with torch.cuda.device_of(logits):
        gather_logps_bwd_kernel[(logits.shape[:-1].numel() * blocks,)](
            results.dlogp,
            results.targets,
            results.stats,
            results.dentropy,
            results.entropy,
            logits,
            results.mask,
            results.offsets,
            out,
            vocab,
            inner,
            *strides,
            *grad_strides,
            blocks,
            temperature,
            LOG2E.value / temperature,
            BLOCK_V=BLOCK_V,
            num_warps=NUM_WARPS,
        )
