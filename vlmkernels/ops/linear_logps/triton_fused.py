"""linear_logps without logits in Triton: a GEMM with an online softmax as its epilogue.

Each program computes a block of rows and a part of the vocabulary, and a second kernel merges the parts.

With u, z and m as in linear_logps/reference.py, c = log2(e) inverse and y_v = (u_v - m) c, a program accumulates for each of
its rows (m, s = sum 2^y, sy = sum 2^y y, u of the target). Two such tuples merge exactly; logp and entropy follow from the
result without cancellation.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from vlmkernels.ops.gather_logps.triton import LN2, LOG2E, LOWEST, exp2_and_exponent
from vlmkernels.ops.launch import unsupported_dtype
from vlmkernels.ops.linear_logps.inputs import SelectedRows
from vlmkernels.ops.linear_logps.triton import capped

INTERPRETED = triton.knobs.runtime.interpret
GROUP = 16  # this many blocks of rows run side by side, so that their hidden states stay in the L2 cache
BLOCK_MERGE = 128


class Blocks(NamedTuple):
    """The block sizes of a GEMM."""

    rows: int
    vocab: int
    width: int
    num_warps: int
    num_stages: int
    tma: bool = False  # read the weight by a tensor descriptor, if its strides and address allow one


# For 16-bit operands, by compute capability. None spills (tests/ops/test_triton_compile.py); none has been tuned on a GPU.
BLOCKS = {
    (8, 0): Blocks(128, 128, 64, 8, 4),
    (9, 0): Blocks(128, 256, 64, 8, 4, tma=True),
    (10, 0): Blocks(128, 256, 64, 8, 3),
}
ELSEWHERE = Blocks(128, 128, 32, 8, 3)  # fits in 48 KiB of shared memory
CAPPED = Blocks(128, 64, 64, 8, 3)  # tanh needs registers
FP32 = Blocks(64, 64, 16, 8, 3)  # no tensor cores


def unsupported(hidden: torch.Tensor) -> str | None:
    return unsupported_dtype(hidden)


@triton.jit(do_not_specialize=["N", "R", "splits"])
def linear_logps_fused_kernel(
    hidden_ptr,  # (R, H)
    index_ptr,  # (N,): the selected rows; None: all, N = R
    weight_ptr,  # (V, H); with TMA its descriptor
    bias_ptr,  # (V,) or None
    targets_ptr,  # (N,), below 0: a token of another part of the vocabulary
    partial_ptr,  # (splits, 4, N) out: m, s, sy, u of the target (0 if it is in another split)
    N,
    R,
    V,
    H,
    stride_hidden,
    stride_weight,
    step_weight,
    splits,
    scale,  # c
    softcap,
    logit_scale,
    CAP: tl.constexpr,
    WIDEN: tl.constexpr,  # the interpreter has no products of bf16
    TMA: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Grid (cdiv(N, BLOCK_N) * splits,): the tuples of BLOCK_N rows over one part of the vocabulary."""
    pid = tl.program_id(0)
    first = pid // (GROUP * splits) * GROUP
    side_by_side = tl.minimum(tl.cdiv(N, BLOCK_N) - first, GROUP)
    block = first + pid % (GROUP * splits) % side_by_side
    part = pid % (GROUP * splits) // side_by_side
    n = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    row = n if index_ptr is None else tl.load(index_ptr + n, mask=inside, other=0)
    row = tl.minimum(tl.maximum(row, 0), R - 1)  # rows out of range are computed but not stored
    target = tl.load(targets_ptr + n, mask=inside, other=-1).to(tl.int32)
    h = tl.arange(0, BLOCK_H)
    step = tl.cast(step_weight, tl.int64)
    a_ptr = hidden_ptr + row[:, None] * stride_hidden + h[None, :]
    size = tl.cdiv(tl.cdiv(V, BLOCK_V), splits) * BLOCK_V
    m = tl.full((BLOCK_N,), LOWEST, tl.float32)
    s = tl.zeros((BLOCK_N,), tl.float32)
    sy = tl.zeros((BLOCK_N,), tl.float32)
    u_target = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(part * size, tl.minimum(part * size + size, V), BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        column = tl.minimum(v, V - 1).to(tl.int64)
        if not TMA:
            w_ptr = weight_ptr + column[None, :] * stride_weight + h[:, None] * step
        x = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for k in range(0, H, BLOCK_H):
            a = tl.load(a_ptr + k, mask=k + h[None, :] < H, other=0.0)
            in_width = k + h[:, None] < H
            w = weight_ptr.load([start, k]).T if TMA else tl.load(w_ptr + k * step, mask=in_width, other=0.0)
            if WIDEN:
                a = a.to(tl.float32)
                w = w.to(tl.float32)
            x = tl.dot(a, w, x, input_precision="ieee")
        if bias_ptr is not None:
            x += tl.load(bias_ptr + column).to(tl.float32)[None, :]
        u = tl.where(v[None, :] < V, capped(x, softcap, logit_scale, CAP), -float("inf"))
        u_target += tl.sum(tl.where(v[None, :] == target[:, None], u, 0.0), 1)
        top = tl.maximum(m, tl.max(u, 1))
        shift = tl.maximum((m - top) * scale, -126.0)
        e, y = exp2_and_exponent((u - top[:, None]) * scale)
        sy = (sy + s * shift) * tl.exp2(shift) + tl.sum(e * y, 1)
        s = s * tl.exp2(shift) + tl.sum(e, 1)
        m = top
    out = partial_ptr + part.to(tl.int64) * 4 * N + n
    tl.store(out, m, mask=inside)
    tl.store(out + N, s, mask=inside)
    tl.store(out + 2 * N, sy, mask=inside)
    tl.store(out + 3 * N, u_target, mask=inside)


@triton.jit(do_not_specialize=["N", "R", "splits"])
def linear_logps_merge_kernel(
    index_ptr,  # as above
    targets_ptr,
    partial_ptr,  # (splits, 4, N)
    logp_ptr,  # (N,) out
    entropy_ptr,  # (N,) out
    stats_ptr,  # (N, 2) out: m, log sum exp((u - m) inverse)
    N,
    R,
    V,
    splits,
    inverse,
    BLOCK_N: tl.constexpr,
):
    """Grid (cdiv(N, BLOCK_N),): merge the splits of a row and write its results."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    scale = inverse * LOG2E
    m = tl.full((BLOCK_N,), LOWEST, tl.float32)
    s = tl.zeros((BLOCK_N,), tl.float32)
    sy = tl.zeros((BLOCK_N,), tl.float32)
    u_target = tl.zeros((BLOCK_N,), tl.float32)
    for part in range(splits):
        own = partial_ptr + tl.cast(part, tl.int64) * 4 * N + n
        m_part = tl.load(own, mask=inside, other=LOWEST)
        s_part = tl.load(own + N, mask=inside, other=1.0)
        top = tl.maximum(m, m_part)
        shift = tl.maximum((m - top) * scale, -126.0)
        shift_part = tl.maximum((m_part - top) * scale, -126.0)
        sy_part = tl.load(own + 2 * N, mask=inside, other=0.0)
        sy = (sy + s * shift) * tl.exp2(shift) + (sy_part + s_part * shift_part) * tl.exp2(shift_part)
        s = s * tl.exp2(shift) + s_part * tl.exp2(shift_part)
        u_target += tl.load(own + 3 * N, mask=inside, other=0.0)
        m = top
    target = tl.load(targets_ptr + n, mask=inside, other=0)
    row = n if index_ptr is None else tl.load(index_ptr + n, mask=inside, other=0)
    log_sum = tl.where((row >= 0) & (row < R), tl.log(s), float("nan"))  # NaN: no such row
    logp = tl.where(target >= 0, (u_target - m) * inverse - log_sum, -float("inf"))
    tl.store(logp_ptr + n, tl.where(target < V, logp, float("nan")), mask=inside)  # NaN: no such token
    tl.store(entropy_ptr + n, log_sum - sy / s * LN2, mask=inside)
    tl.store(stats_ptr + 2 * n, m, mask=inside)
    tl.store(stats_ptr + 2 * n + 1, log_sum, mask=inside)


def blocks_of(dtype: torch.dtype, capability: tuple[int, int] | None, capped: bool) -> Blocks:
    """Return the block sizes for operands of ``dtype``."""
    if dtype == torch.float32:
        return FP32
    return CAPPED if capped else BLOCKS.get(capability, ELSEWHERE)


def processors(device: torch.device) -> int:
    """Return the number of multiprocessors of ``device``."""
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@cache
def splits_of(row_blocks: int, vocab_blocks: int, processors: int) -> int:
    """Return the number of parts of the vocabulary that minimizes the estimated time.

    The time is the number of rounds in which the processors run all programs, times the time of a program: its blocks of the
    vocabulary and a constant start-up time.
    """

    def time(splits):
        start_up = 0.25  # in blocks of the vocabulary
        return triton.cdiv(row_blocks * splits, processors) * (triton.cdiv(vocab_blocks, splits) + start_up)

    return min(range(1, min(vocab_blocks, 4 * processors) + 1), key=time)


def has_descriptor(weight: torch.Tensor) -> bool:
    """Whether a tensor descriptor supports ``weight``: contiguous rows, each at a multiple of 16 bytes."""
    stride, step = weight.stride()
    return step == 1 and stride * weight.element_size() % 16 == 0 and weight.data_ptr() % 16 == 0


def fwd(hidden, index, selected: SelectedRows, head) -> None:
    """Write logp, entropy and stats, see reference.py, of the rows ``index`` (None: all) of ``hidden`` (R, H)."""
    num, vocab = len(selected.targets), len(head.weight)
    if not num:
        return
    capability = torch.cuda.get_device_capability(hidden.device) if hidden.device.type == "cuda" else None
    blocks = blocks_of(hidden.dtype, capability, head.softcap is not None)
    row_blocks = triton.cdiv(num, blocks.rows)
    splits = splits_of(row_blocks, triton.cdiv(vocab, blocks.vocab), processors(hidden.device))
    partial = selected.logp.new_empty(splits, 4, num)
    tma = blocks.tma and has_descriptor(head.weight)
    with torch.cuda.device_of(hidden):
        linear_logps_fused_kernel[(row_blocks * splits,)](
            hidden,
            index,
            TensorDescriptor.from_tensor(head.weight, [blocks.vocab, blocks.width]) if tma else head.weight,
            head.bias,
            selected.targets,
            partial,
            num,
            len(hidden),
            vocab,
            hidden.shape[1],
            hidden.stride(0),
            *head.weight.stride(),
            splits,
            head.inverse * LOG2E.value,
            head.softcap or 0.0,
            head.logit_scale,
            CAP=head.softcap is not None,
            WIDEN=INTERPRETED,
            TMA=tma,
            GROUP=GROUP,
            BLOCK_N=blocks.rows,
            BLOCK_V=blocks.vocab,
            BLOCK_H=blocks.width,
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )
        linear_logps_merge_kernel[(triton.cdiv(num, BLOCK_MERGE),)](
            index,
            selected.targets,
            partial,
            selected.logp,
            selected.entropy,
            selected.stats,
            num,
            len(hidden),
            vocab,
            splits,
            head.inverse,
            BLOCK_N=BLOCK_MERGE,
            num_warps=4,
        )
