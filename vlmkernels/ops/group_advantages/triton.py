"""group_advantages in Triton: one program, so that statistics of the batch need no second launch. Formulas: reference.py."""

import torch
import triton
import triton.language as tl

from vlmkernels.ops.group_advantages.inputs import GroupAdvantages, Inputs
from vlmkernels.ops.launch import unless_fp32

TILE = 2048  # the number of rewards per iteration
INFINITY = tl.constexpr(float("inf"))


def unsupported(rewards: torch.Tensor) -> str | None:
    return unless_fp32(rewards)


@triton.jit
def moments(x, given):
    """Return count, mean and standard deviation (ddof 1) of the given elements of each row, and whether they are all equal.

    The standard deviation of equal elements is exactly 0.
    """
    count = tl.sum(given.to(tl.float32), 1)[:, None]
    mean = tl.sum(tl.where(given, x, 0.0), 1)[:, None] / tl.maximum(count, 1.0)
    distance = tl.where(given, x - mean, 0.0)
    std = tl.sqrt(tl.sum(distance * distance, 1)[:, None] / tl.maximum(count - 1.0, 1.0))
    greatest = tl.max(tl.where(given, x, -INFINITY), 1)[:, None]
    least = tl.min(tl.where(given, x, INFINITY), 1)[:, None]
    equal = greatest <= least
    return count, mean, tl.where(equal, 0.0, std), equal


@triton.jit
def divisor(std, eps):
    """Return std + eps, or infinity if std is 0, so that the quotient is exactly 0 for any eps."""
    return tl.where(std == 0, INFINITY, std + eps)


@triton.jit
def no_baseline(r, scored, count, mean, equal):
    return r


@triton.jit
def group_mean(r, scored, count, mean, equal):
    return tl.where(equal, 0.0, r - mean)


@triton.jit
def leave_one_out(r, scored, count, mean, equal):
    return tl.where(equal, 0.0, r - mean) * count / tl.maximum(count - 1.0, 1.0)


@triton.jit
def pass_at_k(r, scored, count, mean, equal):
    best = tl.max(tl.where(scored, r, -INFINITY), 1)[:, None]
    is_best = scored & (r == best)
    alone = tl.sum(is_best.to(tl.float32), 1)[:, None] == 1
    second = tl.max(tl.where(scored & (r != best), r, -INFINITY), 1)[:, None]
    return tl.where(is_best & alone & (count > 1), best - second, 0.0)


BASELINES = {"none": no_baseline, "mean": group_mean, "leave_one_out": leave_one_out, "pass_at_k": pass_at_k}


@triton.jit(do_not_specialize=["N", "K", "R", "group_size"])
def group_advantages_kernel(
    rewards_ptr,  # (N, R), NaN: not scored
    weights_ptr,  # (R,) or None
    offsets_ptr,  # (K + 1,) or None: groups of group_size
    advantages_ptr,  # (N,) out
    total_ptr,  # (N,) out
    mean_ptr,  # (N,) out
    std_ptr,  # (N,) out
    degenerate_ptr,  # (N,) out
    N,
    K,
    R,
    group_size,
    eps,
    BASELINE: tl.constexpr,
    SCALE: tl.constexpr,
    NORMALIZE_FIRST: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,  # at least the size of the largest group
):
    """Grid (1,): write all results. GROUPS groups are processed at once, each as a row of BLOCK_G elements."""
    for first in range(0, K, GROUPS):
        g = first + tl.arange(0, GROUPS)
        if offsets_ptr is None:
            start = g * group_size
            end = tl.where(g < K, start + group_size, start)
        else:
            start = tl.load(offsets_ptr + g, mask=g < K, other=0)
            end = tl.load(offsets_ptr + g + 1, mask=g < K, other=0)
        i = start[:, None] + tl.arange(0, BLOCK_G)[None, :]
        valid = i < end[:, None]
        r = tl.zeros((GROUPS, BLOCK_G), tl.float32)
        scored = tl.zeros((GROUPS, BLOCK_G), tl.int1)
        for k in range(0, R):
            weight = 1.0 if weights_ptr is None else tl.load(weights_ptr + k)
            x = tl.load(rewards_ptr + i.to(tl.int64) * R + k, mask=valid, other=float("nan"))
            r += tl.where(x == x, weight * x, 0.0)
            scored = scored | (x == x)
        count, mean, std, equal = moments(r, scored)
        tl.store(total_ptr + i, tl.where(scored, r, float("nan")), mask=valid)
        tl.store(mean_ptr + i, mean + 0.0 * r, mask=valid)
        tl.store(std_ptr + i, std + 0.0 * r, mask=valid)
        tl.store(degenerate_ptr + i, equal | (r != r), mask=valid)
        if NORMALIZE_FIRST:
            result = tl.zeros((GROUPS, BLOCK_G), tl.float32)
            for k in range(0, R):
                weight = 1.0 if weights_ptr is None else tl.load(weights_ptr + k)
                x = tl.load(rewards_ptr + i.to(tl.int64) * R + k, mask=valid, other=float("nan"))
                _count, mean_k, std_k, _equal = moments(x, x == x)
                result += tl.where(x == x, weight * (x - mean_k) / divisor(std_k, eps), 0.0)
        else:
            result = BASELINE(r, scored, count, mean, equal)
            if SCALE == "group":
                result = result / divisor(std, eps)
        tl.store(advantages_ptr + i, tl.where(scored, result, 0.0), mask=valid)
    if NORMALIZE_FIRST or SCALE == "batch":
        tl.debug_barrier()
        # Statistics of the rewards, or with NORMALIZE_FIRST of the sums that were written to `advantages`.
        values_ptr = advantages_ptr if NORMALIZE_FIRST else total_ptr
        BLOCK: tl.constexpr = GROUPS * BLOCK_G
        offset = tl.arange(0, BLOCK)
        count = tl.zeros((BLOCK,), tl.float32)
        sums = tl.zeros((BLOCK,), tl.float32)
        greatest = tl.full((BLOCK,), -INFINITY, tl.float32)
        least = tl.full((BLOCK,), INFINITY, tl.float32)
        for start in range(0, N, BLOCK):
            total = tl.load(total_ptr + start + offset, mask=start + offset < N, other=float("nan"))
            x = tl.load(values_ptr + start + offset, mask=start + offset < N, other=0.0)
            given = total == total
            count += given.to(tl.float32)
            sums += tl.where(given, x, 0.0)
            greatest = tl.maximum(greatest, tl.where(given, x, -INFINITY))
            least = tl.minimum(least, tl.where(given, x, INFINITY))
        number = tl.sum(count, 0)
        mean = tl.sum(sums, 0) / tl.maximum(number, 1.0)
        equal = tl.max(greatest, 0) <= tl.min(least, 0)
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, N, BLOCK):
            total = tl.load(total_ptr + start + offset, mask=start + offset < N, other=float("nan"))
            x = tl.load(values_ptr + start + offset, mask=start + offset < N, other=0.0)
            distance = tl.where(total == total, x - mean, 0.0)
            squares += distance * distance
        std = tl.where(equal, 0.0, tl.sqrt(tl.sum(squares, 0) / tl.maximum(number - 1.0, 1.0)))
        tl.debug_barrier()
        for start in range(0, N, BLOCK):
            inside = start + offset < N
            total = tl.load(total_ptr + start + offset, mask=inside, other=float("nan"))
            x = tl.load(advantages_ptr + start + offset, mask=inside, other=0.0)
            if NORMALIZE_FIRST:
                x -= mean
            tl.store(advantages_ptr + start + offset, tl.where(total == total, x / divisor(std, eps), 0.0), mask=inside)


def fwd(inputs: Inputs, outputs: GroupAdvantages) -> None:
    rewards, weights = inputs.rewards, inputs.weights
    block = triton.next_power_of_2(inputs.group_size)
    with torch.cuda.device_of(rewards):
        group_advantages_kernel[(1,)](
            rewards.contiguous(),
            weights if weights is None else weights.contiguous(),
            inputs.offsets,
            *outputs,
            len(rewards),
            inputs.num_groups,
            rewards.shape[1],
            inputs.group_size,
            inputs.eps,
            BASELINE=BASELINES[inputs.baseline],
            SCALE=inputs.scale,
            NORMALIZE_FIRST=inputs.normalize_first,
            GROUPS=max(1, TILE // block),
            BLOCK_G=block,
            num_warps=8,
        )
