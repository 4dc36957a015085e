"""linear_kl on a chunk of logits in Triton, one program per row. The formulas are in reference.py and divergence.py."""

import torch
import triton
import triton.language as tl

from vlmkernels.ops.gather_logps.triton import BLOCK_V, LOG2E, LOWEST, NUM_WARPS
from vlmkernels.ops.launch import unsupported_dtype
from vlmkernels.ops.linear_kl.inputs import Pair, SelectedRows
from vlmkernels.ops.linear_logps.triton import capped, slope_of


def unsupported(*tensors: torch.Tensor) -> str | None:
    return next(filter(None, map(unsupported_dtype, tensors)), None)


@triton.jit
def load_capped(x_ptr, v, V, softcap, logit_scale, CAP: tl.constexpr):
    """Return u; -inf beyond the vocabulary."""
    x = tl.load(x_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
    u = capped(x, softcap, logit_scale, CAP)
    if CAP:
        u = tl.where(v < V, u, -float("inf"))
    return u


@triton.jit
def read_softmax(x_ptr, V, inverse, softcap, logit_scale, CAP: tl.constexpr, BLOCK_V: tl.constexpr):
    """Return m and log sum exp((u - m) inverse) of a row."""
    offset = tl.arange(0, BLOCK_V)
    scale = inverse * LOG2E
    m = tl.full((), LOWEST, tl.float32)
    s = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, BLOCK_V):
        u = load_capped(x_ptr, start + offset, V, softcap, logit_scale, CAP)
        top = tl.maximum(m, tl.max(u, 0))
        s = s * tl.exp2(tl.maximum((m - top) * scale, -126.0)) + tl.exp2((u - top) * scale)
        m = top
    return m, tl.log(tl.sum(s, 0))


@triton.jit
def term(x, log_ratio):
    """x log(x / y) for a probability x, given the logarithm: 0 for x = 0, where it may not be finite. A NaN stays NaN."""
    return tl.where(x > 0.0, x * log_ratio, x)


@triton.jit
def terms(log_p, log_q, beta, KIND: tl.constexpr):
    """Return the terms of D and K."""
    p = tl.exp(log_p)
    q = tl.exp(log_q)
    if KIND == 0:
        total = term(q, log_q - log_p) + (p - q)
        mean = tl.zeros_like(p)
    elif KIND == 1:
        total = term(p, log_p - log_q) + (q - p)
        mean = total
    else:
        # The logarithms are those of m / p and m / q, not of m, so that the rounding of p and q has little effect.
        m = beta * q + (1.0 - beta) * p
        mean = term(p, -tl.log(m / p))
        total = beta * term(q, -tl.log(m / q)) + (1.0 - beta) * mean
    return total, mean


@triton.jit
def gradient(log_p, log_q, mean, beta, KIND: tl.constexpr):
    """Return G."""
    p = tl.exp(log_p)
    q = tl.exp(log_q)
    if KIND == 0:
        return p - q
    elif KIND == 1:
        return term(p, log_p - log_q - mean)
    else:
        m = beta * q + (1.0 - beta) * p
        return (1.0 - beta) * term(p, -tl.log(m / p) - mean)


@triton.jit
def linear_kl_kernel(
    logits_ptr,  # (n, V)
    teacher_ptr,  # (n, V)
    divergence_ptr,  # (n,) out with READ
    stats_ptr,  # (n, 5) likewise, see reference.py
    upstream_ptr,  # (n,), with WRITE
    dx_ptr,  # (n, V) out with WRITE, row k at k * stride_dx; may share the memory of logits
    V,
    stride_dx,
    beta,
    inverse,
    softcap,
    logit_scale,
    teacher_inverse,
    teacher_softcap,
    teacher_logit_scale,
    CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    KIND: tl.constexpr,  # 0 and 1: beta; 2: between
    READ: tl.constexpr,
    WRITE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Grid (n,): READ writes divergence and stats of a row; WRITE writes the gradient dx of the student's logits."""
    k = tl.program_id(0).to(tl.int64)
    x_ptr = logits_ptr + k * V
    xt_ptr = teacher_ptr + k * V
    stats_ptr += 5 * k
    offset = tl.arange(0, BLOCK_V)
    if READ:
        m, log_sum = read_softmax(x_ptr, V, inverse, softcap, logit_scale, CAP, BLOCK_V)
        mt, log_sum_t = read_softmax(xt_ptr, V, teacher_inverse, teacher_softcap, teacher_logit_scale, TEACHER_CAP, BLOCK_V)
        totals = tl.zeros((BLOCK_V,), tl.float32)
        means = tl.zeros((BLOCK_V,), tl.float32)
        for start in range(0, V, BLOCK_V):
            u = load_capped(x_ptr, start + offset, V, softcap, logit_scale, CAP)
            ut = load_capped(xt_ptr, start + offset, V, teacher_softcap, teacher_logit_scale, TEACHER_CAP)
            log_p = (u - m) * inverse - log_sum
            log_q = (ut - mt) * teacher_inverse - log_sum_t
            of_total, of_mean = terms(log_p, log_q, beta, KIND)
            totals += of_total
            means += of_mean
        mean = tl.sum(means, 0)
        tl.store(divergence_ptr + k, tl.sum(totals, 0))
        tl.store(stats_ptr, m)
        tl.store(stats_ptr + 1, log_sum)
        tl.store(stats_ptr + 2, mt)
        tl.store(stats_ptr + 3, log_sum_t)
        tl.store(stats_ptr + 4, mean)
    else:
        m = tl.load(stats_ptr)
        log_sum = tl.load(stats_ptr + 1)
        mt = tl.load(stats_ptr + 2)
        log_sum_t = tl.load(stats_ptr + 3)
        mean = tl.load(stats_ptr + 4)
    if WRITE:
        factor = tl.load(upstream_ptr + k) * inverse
        tl.debug_barrier()  # other threads may still be reading the row
        for start in range(0, V, BLOCK_V):
            v = start + offset
            u = load_capped(x_ptr, v, V, softcap, logit_scale, CAP)
            ut = load_capped(xt_ptr, v, V, teacher_softcap, teacher_logit_scale, TEACHER_CAP)
            log_p = (u - m) * inverse - log_sum
            log_q = (ut - mt) * teacher_inverse - log_sum_t
            dx = gradient(log_p, log_q, mean, beta, KIND) * (factor * slope_of(u, softcap, logit_scale, CAP))
            tl.debug_barrier()  # a narrower dx overwrites elements that other threads read
            tl.store(dx_ptr + k * stride_dx + v, dx.to(dx_ptr.dtype.element_ty), mask=v < V)


# The arguments of the stage WRITE if it does not run.
NOTHING = {"upstream_ptr": None, "dx_ptr": None, "stride_dx": 0, "WRITE": False}


def launch(logits, teacher_logits, rows: SelectedRows, pair: Pair, *, read: bool, **writing) -> None:
    """Run the kernel on every row."""
    if not len(logits):
        return
    student, teacher = pair.student, pair.teacher
    with torch.cuda.device_of(logits):
        linear_kl_kernel[(len(logits),)](
            logits,
            teacher_logits,
            rows.divergence,
            rows.stats,
            V=logits.shape[1],
            beta=pair.beta,
            inverse=student.inverse,
            softcap=student.softcap or 0.0,
            logit_scale=student.logit_scale,
            teacher_inverse=teacher.inverse,
            teacher_softcap=teacher.softcap or 0.0,
            teacher_logit_scale=teacher.logit_scale,
            CAP=student.softcap is not None,
            TEACHER_CAP=teacher.softcap is not None,
            KIND={0.0: 0, 1.0: 1}.get(pair.beta, 2),
            READ=read,
            BLOCK_V=BLOCK_V,
            num_warps=NUM_WARPS,
            **(NOTHING | writing),
        )


def writing(rows: SelectedRows, out) -> dict:
    """Return the arguments of the stage WRITE."""
    return {"upstream_ptr": rows.upstream, "dx_ptr": out, "stride_dx": out.stride(0), "WRITE": True}


def fwd(logits, teacher_logits, rows: SelectedRows, pair: Pair) -> None:
    launch(logits, teacher_logits, rows, pair, read=True)


def bwd(logits, teacher_logits, rows: SelectedRows, pair: Pair, out) -> None:
    launch(logits, teacher_logits, rows, pair, read=False, **writing(rows, out))


def sweep(logits, teacher_logits, rows: SelectedRows, pair: Pair, out) -> None:
    launch(logits, teacher_logits, rows, pair, read=True, **writing(rows, out))
