"""linear_logps and linear_grpo_loss on a chunk of logits in Triton, one program per row. The formulas are in reference.py.

c = log2(e) inverse and y_v = (u_v - m) c, as in gather_logps/triton.py.
"""

import torch
import triton
import triton.language as tl

from vlmkernels.ops.gather_logps.triton import BLOCK_V, LN2, LOG2E, LOWEST, NUM_WARPS, exp2_and_exponent
from vlmkernels.ops.grpo_loss.triton import MIN_LOGP, at_least, bounded, perception, rollout_log_weight
from vlmkernels.ops.launch import unsupported_dtype
from vlmkernels.ops.linear_logps.inputs import SelectedRows

BLOCK_H = 1024


def unsupported(hidden: torch.Tensor) -> str | None:
    return unsupported_dtype(hidden)


@triton.jit
def capped(x, softcap, logit_scale, CAP: tl.constexpr):
    """Return u, the logit x with the softcap."""
    if CAP:
        # Near 0 tanh is computed by its series, because the difference below would cancel.
        y = x * (logit_scale / softcap)
        square = y * y
        series = y + y * square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
        return softcap * tl.where(square < 0.0625, series, 2.0 * tl.sigmoid(2.0 * y) - 1.0)
    else:
        return x


@triton.jit
def slope_of(u, softcap, logit_scale, CAP: tl.constexpr):
    """Return du/dx."""
    if CAP:
        return logit_scale * (1.0 - (u / softcap) * (u / softcap))
    else:
        return 1.0


@triton.jit
def read_one(ptr, k, otherwise):
    if ptr is None:
        return otherwise
    else:
        return at_least(tl.load(ptr + k), MIN_LOGP)


@triton.jit(do_not_specialize=["stride_hidden"])
def linear_logps_kernel(
    logits_ptr,  # (n, V)
    targets_ptr,  # (n,), below 0: a token of another part of the vocabulary
    hidden_ptr,  # (n, H), to compute the target's logit in fp32; None: it is read from the row
    weight_ptr,  # (V, H)
    bias_ptr,  # (V,) or None
    logp_ptr,  # (n,) out with READ
    entropy_ptr,  # (n,) likewise
    stats_ptr,  # (n, 2) likewise: m, log sum exp((u - m) inverse)
    dlogp_ptr,  # (n,), without SURROGATE
    dentropy_ptr,  # (n,) or None
    old_logp_ptr,  # (n,) each, with SURROGATE; the first four may be None
    ref_logp_ptr,
    rollout_logp_ptr,
    masked_logp_ptr,
    adv_ptr,
    share_ptr,
    dx_ptr,  # (n, V) out with WRITE, row k at k * stride_dx; may share the memory of logits
    V,
    H,
    stride_hidden,
    stride_weight,
    step_weight,
    stride_dx,
    inverse,
    softcap,
    logit_scale,
    entropy_scale,
    p,  # Scalars
    CAP: tl.constexpr,
    READ: tl.constexpr,
    WRITE: tl.constexpr,
    SURROGATE: tl.constexpr,  # None: dlogp and dentropy are given
    KL: tl.constexpr,
    BIAS_CORRECTED: tl.constexpr,
    ROLLOUT: tl.constexpr,
    ROLLOUT_MASK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Grid (n,): READ writes logp, entropy and stats of a row; WRITE writes the gradient dx of its logits."""
    k = tl.program_id(0).to(tl.int64)
    x_ptr = logits_ptr + k * V
    offset = tl.arange(0, BLOCK_V)
    scale = inverse * LOG2E
    target = tl.load(targets_ptr + k)
    here = (target >= 0) & (target < V)
    if READ:
        m = tl.full((), LOWEST, tl.float32)
        s = tl.zeros((BLOCK_V,), tl.float32)
        sy = tl.zeros((BLOCK_V,), tl.float32)
        for v in range(0, V, BLOCK_V):
            x = tl.load(x_ptr + v + offset, mask=v + offset < V, other=-float("inf")).to(tl.float32)
            u = capped(x, softcap, logit_scale, CAP)
            if CAP:
                u = tl.where(v + offset < V, u, -float("inf"))
            top = tl.maximum(m, tl.max(u, 0))
            shift = tl.maximum((m - top) * scale, -126.0)
            e, y = exp2_and_exponent((u - top) * scale)
            sy = (sy + s * shift) * tl.exp2(shift) + e * y
            s = s * tl.exp2(shift) + e
            m = top
        total = tl.sum(s, 0)
        total_y = tl.sum(sy, 0)
        u_target = capped(tl.load(x_ptr + target, mask=here, other=0.0).to(tl.float32), softcap, logit_scale, CAP)
        if hidden_ptr is not None:
            dot = tl.zeros((BLOCK_H,), tl.float32)
            for h in range(0, H, BLOCK_H):
                i = h + tl.arange(0, BLOCK_H)
                a = tl.load(hidden_ptr + k * stride_hidden + i, mask=i < H, other=0.0).to(tl.float32)
                w_ptr = weight_ptr + target * stride_weight + i * step_weight
                # Not (i < H) & here: Triton 3.9's interpreter does not accept the result of a block and a scalar as a mask.
                dot += a * tl.load(w_ptr, mask=i < tl.where(here, H, 0), other=0.0).to(tl.float32)
            exact = tl.sum(dot, 0)
            if bias_ptr is not None:
                exact += tl.load(bias_ptr + target, mask=here, other=0.0).to(tl.float32)
            e_rounded, y_rounded = exp2_and_exponent((u_target - m) * scale)
            u_target = capped(exact, softcap, logit_scale, CAP)
            e_exact, y_exact = exp2_and_exponent((u_target - m) * scale)
            total += tl.where(here, e_exact - e_rounded, 0.0)
            total_y += tl.where(here, e_exact * y_exact - e_rounded * y_rounded, 0.0)
        log_sum = tl.log(total)
        logp = tl.where(here, (u_target - m) * inverse - log_sum, -float("inf"))
        logp = tl.where(target < V, logp, float("nan"))  # no such token
        entropy = log_sum - total_y / total * LN2
        tl.store(logp_ptr + k, logp)
        tl.store(entropy_ptr + k, entropy)
        tl.store(stats_ptr + 2 * k, m)
        tl.store(stats_ptr + 2 * k + 1, log_sum)
    else:
        logp = tl.load(logp_ptr + k)
        entropy = tl.load(entropy_ptr + k)
        m = tl.load(stats_ptr + 2 * k)
        log_sum = tl.load(stats_ptr + 2 * k + 1)
    if WRITE:
        if SURROGATE is not None:
            own = at_least(logp, MIN_LOGP)
            old = read_one(old_logp_ptr, k, own)
            ref = read_one(ref_logp_ptr, k, own)
            rollout = read_one(rollout_logp_ptr, k, old)
            ratio = tl.exp(bounded(own - old))
            weight = 1.0
            if ROLLOUT:
                weight = tl.exp(rollout_log_weight(tl.where(rollout == rollout, old - rollout, 0.0), p, ROLLOUT_MASK))
            _loss, dlogp, _low, _high = SURROGATE(own, ratio, 0.0 * own, tl.load(adv_ptr + k), p)
            kl, dkl = KL(bounded(ref - own))
            through_ratio = 0.0 * own
            direct = p.beta * dkl
            if BIAS_CORRECTED:
                direct *= ratio
                through_ratio = p.beta * kl * ratio
            if masked_logp_ptr is not None:
                masked = at_least(tl.load(masked_logp_ptr + k), MIN_LOGP)
                _loss, dperception, _dmasked, _kl, _entropy, _clipped, _seen = perception(own, masked, p)
                direct += dperception
            # The ratio is per token, so the derivative through it is a derivative by logp, too.
            dlogp = (direct + through_ratio + weight * dlogp) * tl.load(share_ptr + k)
            dentropy = entropy_scale
        else:
            dlogp = tl.load(dlogp_ptr + k)
            dentropy = 0.0 if dentropy_ptr is None else tl.load(dentropy_ptr + k)
        dlogp = tl.where(target < V, dlogp, float("nan"))  # the whole row, like its logp
        # From logp, which is more exact than the target's logit in the row; and 1 - p without cancellation.
        p_target = tl.exp(logp)
        other = tl.where(logp > -0.01, -logp * (1.0 + logp * (0.5 + logp / 6.0)), 1.0 - p_target)
        surprise = tl.where(p_target > 0.0, p_target * (logp + entropy), p_target)
        at_target = (dlogp * other - dentropy * surprise) * inverse
        at_target *= slope_of((logp + log_sum) / inverse + m, softcap, logit_scale, CAP)
        tl.debug_barrier()  # other threads may still be reading the row
        for v in range(0, V, BLOCK_V):
            x = tl.load(x_ptr + v + offset, mask=v + offset < V, other=0.0).to(tl.float32)
            u = capped(x, softcap, logit_scale, CAP)
            e, y = exp2_and_exponent((u - m) * scale - log_sum / LN2)
            dx = -e * (dlogp + dentropy * (y * LN2 + entropy)) * (inverse * slope_of(u, softcap, logit_scale, CAP))
            dx = tl.where(v + offset == target, at_target, dx)
            tl.debug_barrier()  # a narrower dx overwrites elements that other threads read
            tl.store(dx_ptr + k * stride_dx + v + offset, dx.to(dx_ptr.dtype.element_ty), mask=v + offset < V)


# The arguments of a stage that does not run.
NOTHING = {
    **dict.fromkeys(("hidden_ptr", "weight_ptr", "bias_ptr", "dlogp_ptr", "dentropy_ptr", "old_logp_ptr", "ref_logp_ptr")),
    **dict.fromkeys(("rollout_logp_ptr", "masked_logp_ptr", "adv_ptr", "share_ptr", "dx_ptr", "p", "SURROGATE", "KL")),
    **dict.fromkeys(("H", "stride_hidden", "stride_weight", "step_weight", "stride_dx"), 0),
    **dict.fromkeys(("READ", "WRITE", "BIAS_CORRECTED", "ROLLOUT", "ROLLOUT_MASK"), False),
    "entropy_scale": 0.0,
}  # fmt: skip


def launch(logits, selected: SelectedRows, head, **stages) -> None:
    """Run the kernel on every row, with the arguments of the stages READ and WRITE."""
    with torch.cuda.device_of(logits):
        linear_logps_kernel[(len(logits),)](
            logits,
            selected.targets,
            logp_ptr=selected.logp,
            entropy_ptr=selected.entropy,
            stats_ptr=selected.stats,
            V=logits.shape[1],
            inverse=head.inverse,
            softcap=head.softcap or 0.0,
            logit_scale=head.logit_scale,
            CAP=head.softcap is not None,
            BLOCK_V=BLOCK_V,
            BLOCK_H=BLOCK_H,
            num_warps=NUM_WARPS,
            **(NOTHING | stages),
        )


def reading(logits, hidden, head) -> dict:
    """Return the arguments of the stage READ."""
    if logits.dtype == torch.float32:
        return {"READ": True}
    return {
        "READ": True,
        "hidden_ptr": hidden,
        "weight_ptr": head.weight,
        "bias_ptr": head.bias,
        "H": hidden.shape[1],
        "stride_hidden": hidden.stride(0),
        "stride_weight": head.weight.stride(0),
        "step_weight": head.weight.stride(1),
    }


def fwd(logits, hidden, selected: SelectedRows, head) -> None:
    launch(logits, selected, head, **reading(logits, hidden, head))


def bwd(logits, selected: SelectedRows, head, out) -> None:
    launch(
        logits,
        selected,
        head,
        WRITE=True,
        dlogp_ptr=selected.dlogp,
        dentropy_ptr=selected.dentropy,
        dx_ptr=out,
        stride_dx=out.stride(0),
    )
