"""grpo_loss in Triton: one program per sequence, then one program for the batch. The formulas are in reference.py."""

import torch
import triton
import triton.language as tl

from vlmkernels.ops.grpo_loss import config as limits
from vlmkernels.ops.grpo_loss.config import GRPOLossConfig
from vlmkernels.ops.grpo_loss.inputs import COLUMNS, LossInputs
from vlmkernels.ops.launch import unless_fp32

BLOCK_T = 512
BLOCK_S = 256
NUM_WARPS = 8

MAX_LOG_RATIO = tl.constexpr(limits.MAX_LOG_RATIO)
MIN_LOGP = tl.constexpr(limits.MIN_LOGP)
MAX_PERCEPTION_KL = tl.constexpr(limits.MAX_PERCEPTION_KL)
VESPO_MIN_LOG_WEIGHT = tl.constexpr(limits.VESPO_MIN_LOG_WEIGHT)
INFINITY = tl.constexpr(float("inf"))

# The indices of COLUMNS.
COLUMN_LOSS = tl.constexpr(0)
COLUMN_TOKENS = tl.constexpr(1)
COLUMN_UNITS = tl.constexpr(2)
COLUMN_LOW = tl.constexpr(3)
COLUMN_HIGH = tl.constexpr(4)
COLUMN_KL = tl.constexpr(5)
COLUMN_ENTROPY = tl.constexpr(6)
COLUMN_KEPT = tl.constexpr(7)
COLUMN_KEPT_ENTROPY = tl.constexpr(8)
COLUMN_RATIO = tl.constexpr(9)
COLUMN_ROLLOUT = tl.constexpr(10)
COLUMN_EFFECTIVE = tl.constexpr(11)
COLUMN_MASKED_KL = tl.constexpr(12)
COLUMN_MASKED_ENTROPY = tl.constexpr(13)
COLUMN_MASKED_CLIPPED = tl.constexpr(14)
COLUMN_MASKED_TOKENS = tl.constexpr(15)
COLUMN_RATIO_MIN = tl.constexpr(16)
COLUMN_RATIO_MAX = tl.constexpr(17)
COLUMN_LOW_MIN = tl.constexpr(18)
COLUMN_HIGH_MAX = tl.constexpr(19)
NUM_COLUMNS = tl.constexpr(len(COLUMNS))

# The indices of STATS.
STAT_POLICY_SCALE = tl.constexpr(0)
STAT_ENTROPY_SCALE = tl.constexpr(1)
STAT_POLICY_LOSS = tl.constexpr(2)
STAT_KL = tl.constexpr(3)
STAT_ENTROPY = tl.constexpr(4)
STAT_LOW_MEAN = tl.constexpr(5)
STAT_LOW_MIN = tl.constexpr(6)
STAT_HIGH_MEAN = tl.constexpr(7)
STAT_HIGH_MAX = tl.constexpr(8)
STAT_RATIO_MEAN = tl.constexpr(9)
STAT_RATIO_MIN = tl.constexpr(10)
STAT_RATIO_MAX = tl.constexpr(11)
STAT_TOKENS = tl.constexpr(12)
STAT_EFFECTIVE_TOKENS = tl.constexpr(13)
STAT_ROLLOUT_MEAN = tl.constexpr(14)
STAT_REGION_MEAN = tl.constexpr(15)
STAT_MASKED_KL = tl.constexpr(16)
STAT_MASKED_ENTROPY = tl.constexpr(17)
STAT_MASKED_CLIPPED = tl.constexpr(18)
STAT_MASKED_TOKENS = tl.constexpr(19)


def unsupported(logps: torch.Tensor) -> str | None:
    return unless_fp32(logps)


@triton.jit
def at_most(x, high):
    return tl.where(x > high, high, x)  # NaN stays NaN


@triton.jit
def at_least(x, low):
    return tl.where(x < low, low, x)


@triton.jit
def bounded(log_ratio):
    return at_least(at_most(log_ratio, MAX_LOG_RATIO), -MAX_LOG_RATIO)


# Surrogates: the loss, its derivative by logp, and two statistics.


@triton.jit
def ppo_clip(logp, ratio, log_weight, adv, p):
    """-min(min(r, delta) A, clip(r, 1 - eps_low, 1 + eps_high) A)"""
    capped = at_most(ratio, p.delta)
    clipped = at_least(at_most(ratio, 1.0 + p.epsilon_high), 1.0 - p.epsilon_low)
    chosen = tl.where(capped * adv <= clipped * adv, capped, clipped)
    constant = (chosen < ratio) | (chosen > ratio)
    low = (capped < 1.0 - p.epsilon_low) & (adv < 0)
    high = (capped > 1.0 + p.epsilon_high) & (adv > 0)
    return -chosen * adv, tl.where(constant, 0.0, -ratio * adv), low.to(tl.float32), high.to(tl.float32)


@triton.jit
def cispo(logp, ratio, log_weight, adv, p):
    """-sg(min(r, eps_high)) A logp"""
    dlogp = -at_most(ratio, p.epsilon_high) * adv
    return dlogp * logp, dlogp, 0.0 * adv, ((ratio > p.epsilon_high) & (adv > 0)).to(tl.float32)


@triton.jit
def sapo(logp, ratio, log_weight, adv, p):
    """-sigmoid(tau (r - 1)) 4 / tau A, tau by the sign of A"""
    tau = tl.where(adv > 0, p.sapo_temperature_pos, p.sapo_temperature_neg)
    gate = 1.0 / (1.0 + tl.exp(tau * (1.0 - ratio)))
    return -4.0 * gate / tau * adv, -4.0 * gate * (1.0 - gate) * ratio * adv, 0.0 * adv, 0.0 * adv


@triton.jit
def vespo(logp, ratio, log_weight, adv, p):
    """-sg(phi(w)) A logp, phi(w) = e^lambda w^k e^(-lambda w)"""
    k = tl.where(adv >= 0, p.vespo_k_pos, p.vespo_k_neg)
    lam = tl.where(adv >= 0, p.vespo_lambda_pos, p.vespo_lambda_neg)
    phi = tl.exp(at_most(lam + k * log_weight - lam * tl.exp(log_weight), MAX_LOG_RATIO))
    return -phi * adv * logp, -phi * adv, 0.0 * adv, phi


# Name: the function, and whether dlogp is the derivative through the ratio.
SURROGATES = {"ppo_clip": (ppo_clip, True), "cispo": (cispo, False), "sapo": (sapo, True), "vespo": (vespo, False)}

# x = ref_logp - logp -> an estimator of the KL divergence, and its derivative by logp.


@triton.jit
def no_kl(x):
    return 0.0 * x, 0.0 * x


@triton.jit
def k1(x):
    return -x, 0.0 * x + 1.0


@triton.jit
def k2(x):
    return 0.5 * x * x, -x


@triton.jit
def k3(x):
    e = tl.exp(x)
    return e - x - 1.0, 1.0 - e


KL = {"none": no_kl, "k1": k1, "k2": k2, "k3": k3}


@triton.jit
def perception(logp, masked, p):
    """-gamma min(k3, 10) - eta1 logp - eta2 masked, its derivatives by logp and masked, four statistics; 0 if masked is NaN"""
    seen = masked == masked
    kl, dkl = k3(bounded(masked - logp))
    dkl = p.perception_loss_weight * tl.where(kl > MAX_PERCEPTION_KL, 0.0, dkl)
    clipped = (kl > MAX_PERCEPTION_KL).to(tl.float32)
    kl = at_most(kl, MAX_PERCEPTION_KL)
    loss = -p.perception_loss_weight * kl - p.der_loss_weight1 * logp - p.der_loss_weight2 * masked
    dlogp = tl.where(seen, -dkl - p.der_loss_weight1, 0.0)
    dmasked = tl.where(seen, dkl - p.der_loss_weight2, 0.0)
    kl = tl.where(seen, kl, 0.0)
    return tl.where(seen, loss, 0.0), dlogp, dmasked, kl, tl.where(seen, -masked, 0.0), clipped, seen.to(tl.float32)


@triton.jit
def read_logp(ptr, t, mask, otherwise):
    if ptr is None:
        return otherwise
    else:
        return at_least(tl.load(ptr + t, mask=mask, other=0.0), MIN_LOGP)


@triton.jit
def rollout_log_weight(log_ratio, p, MASK: tl.constexpr):
    log_weight = bounded(at_least(at_most(log_ratio, p.rollout_log_max), p.rollout_log_min))
    if MASK:
        outside = (log_ratio > p.rollout_log_max) | (log_ratio < p.rollout_log_min)
        log_weight = tl.where(outside, -1e30, log_weight)
    return log_weight


@triton.jit
def read_token(logp_ptr, old_logp_ptr, rollout_logp_ptr, loss_mask_ptr, t, length):
    """Return valid, logp, old_logp, log(old policy / sampling policy) and log(sampling policy / policy)."""
    valid = t < length
    if loss_mask_ptr is not None:
        valid = valid & (tl.load(loss_mask_ptr + t, mask=valid, other=0) != 0)
    logp = read_logp(logp_ptr, t, valid, 0.0)
    old = read_logp(old_logp_ptr, t, valid, logp)
    rollout = read_logp(rollout_logp_ptr, t, valid, old)
    scored = rollout == rollout
    return valid, logp, old, tl.where(scored, old - rollout, 0.0), tl.where(scored, rollout - logp, 0.0)


@triton.jit
def row_ptr(ptr, s, begin, stride, PACKED: tl.constexpr):
    if PACKED:
        return ptr + begin
    else:
        return ptr + s * stride


@triton.jit
def ratio_of(a, b):
    return a / tl.maximum(b, 1.0)


# Sizes that vary from batch to batch. The kernel is not recompiled for their values.
STRIDES = ("logp", "old", "ref", "rollout", "masked", "entropy", "adv", "loss_mask")
VARYING = ["T", "N", *(f"stride_{name}" for name in STRIDES)]


@triton.jit(do_not_specialize=VARYING)
def grpo_loss_kernel(
    logp_ptr,  # (S, T), sequence s starts at s * stride; or (N,), at cu_seqlens[s]. None: not given
    old_logp_ptr,
    ref_logp_ptr,
    rollout_logp_ptr,
    masked_logp_ptr,
    entropy_ptr,
    adv_ptr,  # likewise, or (S,)
    loss_mask_ptr,
    cu_seqlens_ptr,  # (S + 1,) or None
    threshold_ptr,  # () or None
    dlogp_ptr,  # (S, T) or (N,) out, without policy_scale
    dentropy_ptr,  # likewise or None, without entropy_scale
    dmasked_ptr,  # likewise or None, without policy_scale
    partial_ptr,  # (S, NUM_COLUMNS) out
    num_items_ptr,  # () or None
    divisor,
    T,
    N,
    stride_logp,
    stride_old,
    stride_ref,
    stride_rollout,
    stride_masked,
    stride_entropy,
    stride_adv,
    stride_loss_mask,
    p,  # Scalars
    SURROGATE: tl.constexpr,
    THROUGH_RATIO: tl.constexpr,
    PRODUCT: tl.constexpr,  # the surrogate uses the product of the ratios of a sequence
    KL: tl.constexpr,
    SEQUENCE: tl.constexpr,  # one ratio per sequence
    BIAS_CORRECTED: tl.constexpr,
    PER_LENGTH: tl.constexpr,
    ADV_PER_TOKEN: tl.constexpr,
    ROLLOUT: tl.constexpr,  # "", "token" or "sequence"
    ROLLOUT_MEAN: tl.constexpr,
    ROLLOUT_MASK: tl.constexpr,
    OFF_POLICY: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Grid (S,): write the gradient of a sequence and its row of the partial results."""
    s = tl.program_id(0).to(tl.int64)
    PACKED: tl.constexpr = cu_seqlens_ptr is not None
    if PACKED:
        # Clamped, so that wrong values cause no access outside of the tensors.
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + s).to(tl.int64), 0), N)
        length = tl.maximum(tl.minimum(tl.load(cu_seqlens_ptr + s + 1).to(tl.int64), N), begin) - begin
    else:
        begin = s * T
        length = tl.zeros((), tl.int64) + T
    logp_ptr = row_ptr(logp_ptr, s, begin, stride_logp, PACKED)
    if old_logp_ptr is not None:
        old_logp_ptr = row_ptr(old_logp_ptr, s, begin, stride_old, PACKED)
    if ref_logp_ptr is not None:
        ref_logp_ptr = row_ptr(ref_logp_ptr, s, begin, stride_ref, PACKED)
    if rollout_logp_ptr is not None:
        rollout_logp_ptr = row_ptr(rollout_logp_ptr, s, begin, stride_rollout, PACKED)
    if masked_logp_ptr is not None:
        masked_logp_ptr = row_ptr(masked_logp_ptr, s, begin, stride_masked, PACKED)
    if entropy_ptr is not None:
        entropy_ptr = row_ptr(entropy_ptr, s, begin, stride_entropy, PACKED)
    if loss_mask_ptr is not None:
        loss_mask_ptr = row_ptr(loss_mask_ptr, s, begin, stride_loss_mask, PACKED)
    if ADV_PER_TOKEN:
        adv_ptr = row_ptr(adv_ptr, s, begin, stride_adv, PACKED)
        sequence_adv = 0.0
    else:
        sequence_adv = tl.load(adv_ptr + s * stride_adv)

    # First pass: the sums over the sequence that its tokens depend on.
    block = tl.arange(0, BLOCK_T)
    count = tl.zeros((BLOCK_T,), tl.float32)
    log_ratios = tl.zeros((BLOCK_T,), tl.float32)
    log_weights = tl.zeros((BLOCK_T,), tl.float32)
    gaps = tl.zeros((BLOCK_T,), tl.float32)
    drifts = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(0, length, BLOCK_T):
        valid, logp, old, gap, drift = read_token(
            logp_ptr, old_logp_ptr, rollout_logp_ptr, loss_mask_ptr, start + block, length
        )
        count += valid.to(tl.float32)
        log_ratios += logp - old
        if PRODUCT:
            log_weights += bounded(logp - old)
            if ROLLOUT != "":
                log_rollout = rollout_log_weight(gap, p, ROLLOUT_MASK)
                log_weights += tl.where(valid, at_least(log_rollout, VESPO_MIN_LOG_WEIGHT), 0.0)
        gaps += gap
        drifts += drift
    tokens = tl.sum(count, 0)
    share = 1.0 / divisor
    if num_items_ptr is not None:
        num_items = tl.load(num_items_ptr)
        share = share / tl.where(num_items == 0, 1.0, num_items)
    if PER_LENGTH:
        share = ratio_of(share, tokens)
    sequence_ratio = tl.exp(bounded(ratio_of(tl.sum(log_ratios, 0), tokens)))
    log_weight = at_least(at_most(tl.sum(log_weights, 0), MAX_LOG_RATIO), VESPO_MIN_LOG_WEIGHT)
    sequence_gap = tl.sum(gaps, 0)
    if ROLLOUT_MEAN:
        sequence_gap = ratio_of(sequence_gap, tokens)
    sequence_rollout = tl.exp(rollout_log_weight(sequence_gap, p, ROLLOUT_MASK))
    drifted = (ratio_of(tl.sum(drifts, 0), tokens) <= p.off_policy_threshold) == 0

    value_sum = tl.zeros((BLOCK_T,), tl.float32)
    low_sum = tl.zeros((BLOCK_T,), tl.float32)
    high_sum = tl.zeros((BLOCK_T,), tl.float32)
    kl_sum = tl.zeros((BLOCK_T,), tl.float32)
    entropy_sum = tl.zeros((BLOCK_T,), tl.float32)
    kept_sum = tl.zeros((BLOCK_T,), tl.float32)
    kept_entropy_sum = tl.zeros((BLOCK_T,), tl.float32)
    ratio_sum = tl.zeros((BLOCK_T,), tl.float32)
    rollout_sum = tl.zeros((BLOCK_T,), tl.float32)
    effective_sum = tl.zeros((BLOCK_T,), tl.float32)
    through_sum = tl.zeros((BLOCK_T,), tl.float32)
    if dmasked_ptr is not None:
        masked_kl_sum = tl.zeros((BLOCK_T,), tl.float32)
        masked_entropy_sum = tl.zeros((BLOCK_T,), tl.float32)
        masked_clipped_sum = tl.zeros((BLOCK_T,), tl.float32)
        masked_tokens_sum = tl.zeros((BLOCK_T,), tl.float32)
    ratio_min = tl.full((BLOCK_T,), INFINITY, tl.float32)
    ratio_max = tl.full((BLOCK_T,), -INFINITY, tl.float32)
    for start in range(0, length, BLOCK_T):
        t = start + block
        valid, logp, old, gap, drift = read_token(logp_ptr, old_logp_ptr, rollout_logp_ptr, loss_mask_ptr, t, length)
        m = valid.to(tl.float32)
        adv = tl.load(adv_ptr + t, mask=valid, other=0.0) if ADV_PER_TOKEN else tl.where(valid, sequence_adv, 0.0)
        ratio = m * sequence_ratio if SEQUENCE else m * tl.exp(bounded(logp - old))
        kept = m
        entropy = tl.zeros((BLOCK_T,), tl.float32)
        if entropy_ptr is not None:
            entropy = tl.load(entropy_ptr + t, mask=valid, other=0.0)
            if threshold_ptr is not None:
                kept = tl.where(entropy < tl.load(threshold_ptr), 0.0, m)
        rollout = m
        if ROLLOUT == "sequence":
            rollout = m * sequence_rollout
        elif ROLLOUT == "token":
            rollout = m * tl.exp(rollout_log_weight(gap, p, ROLLOUT_MASK))
        weight = kept
        if not PRODUCT:
            weight = weight * rollout
        if OFF_POLICY:
            weight = tl.where(drifted & ((adv >= 0) == 0), 0.0, weight)

        loss, dlogp, low, high = SURROGATE(logp, ratio, log_weight, adv, p)
        kl, dkl = KL(bounded(read_logp(ref_logp_ptr, t, valid, logp) - logp))
        kl = m * kl
        direct = m * p.beta * dkl
        through = tl.zeros((BLOCK_T,), tl.float32)
        if BIAS_CORRECTED:
            kl *= ratio
            direct *= ratio
            through = p.beta * kl
        if THROUGH_RATIO:
            through += weight * dlogp
        else:
            direct += weight * dlogp
        if dmasked_ptr is not None:
            masked = at_least(tl.load(masked_logp_ptr + t, mask=valid, other=float("nan")), MIN_LOGP)
            value, dvalue, dmasked, masked_kl, masked_entropy, masked_clipped, masked_tokens = perception(logp, masked, p)
            tl.store(dmasked_ptr + begin + t, dmasked * share, mask=t < length)
            direct += dvalue
            value_sum += value
            masked_kl_sum += masked_kl
            masked_entropy_sum += masked_entropy
            masked_clipped_sum += masked_clipped
            masked_tokens_sum += masked_tokens
        if SEQUENCE:
            through_sum += through
        else:
            direct += through
        tl.store(dlogp_ptr + begin + t, direct * share, mask=t < length)
        if dentropy_ptr is not None:
            tl.store(dentropy_ptr + begin + t, kept, mask=t < length)
        value_sum += weight * loss + p.beta * kl
        low_sum += m * low
        high_sum += m * high
        kl_sum += kl
        entropy_sum += entropy
        kept_sum += kept
        kept_entropy_sum += kept * entropy
        ratio_sum += ratio
        if ROLLOUT != "":
            rollout_sum += rollout
        effective_sum += (weight > 0).to(tl.float32)
        ratio_min = tl.minimum(ratio_min, tl.where(valid, ratio, INFINITY))
        ratio_max = tl.maximum(ratio_max, ratio)

    # If ratio and advantage are per sequence, its statistics count once, not once per token.
    low = tl.sum(low_sum, 0)
    high = tl.sum(high_sum, 0)
    units = tokens
    if (SEQUENCE or PRODUCT) and not ADV_PER_TOKEN:
        _loss, _dlogp, low, high = SURROGATE(0.0, sequence_ratio, log_weight, sequence_adv, p)
        units = 1.0
    out = partial_ptr + s * NUM_COLUMNS
    tl.store(out + COLUMN_LOSS, tl.sum(value_sum, 0) * share)
    tl.store(out + COLUMN_TOKENS, tokens)
    tl.store(out + COLUMN_UNITS, units)
    tl.store(out + COLUMN_LOW, low)
    tl.store(out + COLUMN_HIGH, high)
    tl.store(out + COLUMN_KL, tl.sum(kl_sum, 0))
    tl.store(out + COLUMN_ENTROPY, tl.sum(entropy_sum, 0))
    tl.store(out + COLUMN_KEPT, tl.sum(kept_sum, 0))
    tl.store(out + COLUMN_KEPT_ENTROPY, tl.sum(kept_entropy_sum, 0))
    tl.store(out + COLUMN_RATIO, tl.sum(ratio_sum, 0))
    tl.store(out + COLUMN_ROLLOUT, tl.sum(rollout_sum, 0) if ROLLOUT != "" else tokens)
    tl.store(out + COLUMN_EFFECTIVE, tl.sum(effective_sum, 0))
    if dmasked_ptr is not None:
        tl.store(out + COLUMN_MASKED_KL, tl.sum(masked_kl_sum, 0))
        tl.store(out + COLUMN_MASKED_ENTROPY, tl.sum(masked_entropy_sum, 0))
        tl.store(out + COLUMN_MASKED_CLIPPED, tl.sum(masked_clipped_sum, 0))
        tl.store(out + COLUMN_MASKED_TOKENS, tl.sum(masked_tokens_sum, 0))
    tl.store(out + COLUMN_RATIO_MIN, tl.min(ratio_min, 0))
    tl.store(out + COLUMN_RATIO_MAX, tl.max(ratio_max, 0))
    tl.store(out + COLUMN_LOW_MIN, tl.where(units > 0, ratio_of(low, units), INFINITY))
    tl.store(out + COLUMN_HIGH_MAX, tl.where(units > 0, ratio_of(high, units), -INFINITY))

    if SEQUENCE:
        # Spread the gradient through the ratio of the sequence evenly over its tokens. The barrier: other threads wrote dlogp.
        tl.debug_barrier()
        spread = ratio_of(tl.sum(through_sum, 0), tokens) * share
        for start in range(0, length, BLOCK_T):
            t = start + block
            valid = t < length
            if loss_mask_ptr is not None:
                valid = valid & (tl.load(loss_mask_ptr + t, mask=valid, other=0) != 0)
            dlogp = tl.load(dlogp_ptr + begin + t, mask=valid, other=0.0)
            tl.store(dlogp_ptr + begin + t, dlogp + spread, mask=valid)


@triton.jit
def column_sum(partial_ptr, column, S, BLOCK_S: tl.constexpr):
    total = tl.zeros((BLOCK_S,), tl.float32)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S).to(tl.int64)
        total += tl.load(partial_ptr + s * NUM_COLUMNS + column, mask=s < S, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def column_max(partial_ptr, column, S, sign, BLOCK_S: tl.constexpr):
    """Return the maximum of a column (sign = 1) or its minimum (sign = -1); 0 if there are no values."""
    greatest = tl.full((BLOCK_S,), -INFINITY, tl.float32)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S).to(tl.int64)
        x = sign * tl.load(partial_ptr + s * NUM_COLUMNS + column, mask=s < S, other=-sign * INFINITY)
        greatest = tl.maximum(greatest, x)
    result = tl.max(greatest, 0)
    return tl.where(result == -INFINITY, 0.0, sign * result)


@triton.jit(do_not_specialize=["S"])
def grpo_loss_finish_kernel(
    partial_ptr,  # (S, NUM_COLUMNS)
    loss_ptr,  # () out
    stats_ptr,  # (len(STATS),) out
    S,
    entropy_coef,
    accumulation_steps,
    BY_TOKENS: tl.constexpr,
    PERCEPTION: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Grid (1,): write the loss and the statistics."""
    tokens = column_sum(partial_ptr, COLUMN_TOKENS, S, BLOCK_S)
    units = column_sum(partial_ptr, COLUMN_UNITS, S, BLOCK_S)
    policy_scale = ratio_of(1.0, tokens) if BY_TOKENS else 1.0
    entropy_scale = -ratio_of(entropy_coef, column_sum(partial_ptr, COLUMN_KEPT, S, BLOCK_S)) / accumulation_steps
    policy_loss = column_sum(partial_ptr, COLUMN_LOSS, S, BLOCK_S) * policy_scale
    # Without a coefficient the entropy is only a metric, and may be NaN.
    bonus = tl.where(entropy_coef == 0, 0.0, entropy_scale * column_sum(partial_ptr, COLUMN_KEPT_ENTROPY, S, BLOCK_S))
    tl.store(loss_ptr, policy_loss + bonus)
    tl.store(stats_ptr + STAT_POLICY_SCALE, policy_scale)
    tl.store(stats_ptr + STAT_ENTROPY_SCALE, entropy_scale)
    tl.store(stats_ptr + STAT_POLICY_LOSS, policy_loss)
    tl.store(stats_ptr + STAT_KL, ratio_of(column_sum(partial_ptr, COLUMN_KL, S, BLOCK_S), tokens))
    tl.store(stats_ptr + STAT_ENTROPY, ratio_of(column_sum(partial_ptr, COLUMN_ENTROPY, S, BLOCK_S), tokens))
    low = ratio_of(column_sum(partial_ptr, COLUMN_LOW, S, BLOCK_S), units)
    high = ratio_of(column_sum(partial_ptr, COLUMN_HIGH, S, BLOCK_S), units)
    tl.store(stats_ptr + STAT_LOW_MEAN, low)
    tl.store(stats_ptr + STAT_LOW_MIN, column_max(partial_ptr, COLUMN_LOW_MIN, S, -1.0, BLOCK_S))
    tl.store(stats_ptr + STAT_HIGH_MEAN, high)
    tl.store(stats_ptr + STAT_HIGH_MAX, column_max(partial_ptr, COLUMN_HIGH_MAX, S, 1.0, BLOCK_S))
    tl.store(stats_ptr + STAT_RATIO_MEAN, ratio_of(column_sum(partial_ptr, COLUMN_RATIO, S, BLOCK_S), tokens))
    tl.store(stats_ptr + STAT_RATIO_MIN, column_max(partial_ptr, COLUMN_RATIO_MIN, S, -1.0, BLOCK_S))
    tl.store(stats_ptr + STAT_RATIO_MAX, column_max(partial_ptr, COLUMN_RATIO_MAX, S, 1.0, BLOCK_S))
    tl.store(stats_ptr + STAT_TOKENS, tokens)
    tl.store(stats_ptr + STAT_EFFECTIVE_TOKENS, column_sum(partial_ptr, COLUMN_EFFECTIVE, S, BLOCK_S))
    tl.store(stats_ptr + STAT_ROLLOUT_MEAN, ratio_of(column_sum(partial_ptr, COLUMN_ROLLOUT, S, BLOCK_S), tokens))
    tl.store(stats_ptr + STAT_REGION_MEAN, low + high)  # a token is clipped at one bound at most
    if PERCEPTION:
        seen = column_sum(partial_ptr, COLUMN_MASKED_TOKENS, S, BLOCK_S)
        tl.store(stats_ptr + STAT_MASKED_KL, ratio_of(column_sum(partial_ptr, COLUMN_MASKED_KL, S, BLOCK_S), seen))
        tl.store(stats_ptr + STAT_MASKED_ENTROPY, ratio_of(column_sum(partial_ptr, COLUMN_MASKED_ENTROPY, S, BLOCK_S), seen))
        tl.store(stats_ptr + STAT_MASKED_CLIPPED, ratio_of(column_sum(partial_ptr, COLUMN_MASKED_CLIPPED, S, BLOCK_S), seen))
        tl.store(stats_ptr + STAT_MASKED_TOKENS, seen)


def _row_major(x: torch.Tensor | None, whole_rows: bool = True) -> torch.Tensor | None:
    return x if x is None or x.stride(-1) == 1 or not whole_rows else x.contiguous()


def fwd(inputs: LossInputs, config: GRPOLossConfig, loss, dlogp, dentropy, dmasked, stats) -> None:
    size = inputs.num_sequences
    rows = [inputs.logps, inputs.old_logps, inputs.ref_logps, inputs.rollout_logps, inputs.masked_logps, inputs.entropy]
    rows = [*map(_row_major, rows), _row_major(inputs.advantages, inputs.per_token), _row_major(inputs.loss_mask)]
    divisor, num_items, by_tokens = inputs.divisor(config)
    partial = stats.new_empty(size, NUM_COLUMNS.value)
    surrogate, through_ratio = SURROGATES[config.loss.surrogate]
    level, _, bound = (config.rollout_correction or "").partition("_")
    with torch.cuda.device_of(inputs.logps):
        if size:
            grpo_loss_kernel[(size,)](
                *rows,
                inputs.cu_seqlens if inputs.cu_seqlens is None else inputs.cu_seqlens.contiguous(),
                inputs.entropy_threshold,
                dlogp,
                dentropy if dentropy.numel() else None,
                dmasked if config.perception else None,
                partial,
                num_items,
                divisor,
                inputs.logps.shape[-1],
                inputs.logps.numel(),
                *(0 if x is None else x.stride(0) for x in rows),
                config.scalars,
                SURROGATE=surrogate,
                THROUGH_RATIO=through_ratio,
                PRODUCT=config.loss.surrogate == "vespo",
                KL=KL[config.kl],
                SEQUENCE=config.level == "sequence",
                BIAS_CORRECTED=config.use_bias_correction_kl,
                PER_LENGTH=config.aggregation.per_length,
                ADV_PER_TOKEN=inputs.per_token,
                ROLLOUT=level,
                ROLLOUT_MEAN=config.rollout_sequence_ratio == "mean",
                ROLLOUT_MASK=bound == "mask",
                OFF_POLICY=config.off_policy_mask_threshold is not None,
                BLOCK_T=BLOCK_T,
                num_warps=NUM_WARPS,
            )
        grpo_loss_finish_kernel[(1,)](
            partial,
            loss,
            stats,
            size,
            config.entropy_coef,
            inputs.accumulation_steps,
            BY_TOKENS=by_tokens,
            PERCEPTION=config.perception,
            BLOCK_S=BLOCK_S,
            num_warps=4,
        )
