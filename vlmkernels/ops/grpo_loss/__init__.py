"""The GRPO objective on given log-probabilities. Torch only: triton and ``_C`` load on first use."""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.library import define, impl, register_fake

from vlmkernels.backend import resolve, select
from vlmkernels.ops.dispatch import needs_dispatcher
from vlmkernels.ops.grpo_loss.batch import STATS, Batch, entropy_quantile, metrics, require_finite
from vlmkernels.ops.grpo_loss.check import check_config, check_layout, check_values, prepare
from vlmkernels.ops.grpo_loss.config import DEFAULT, GRPOLossConfig, parse

__all__ = ["GRPOLossConfig", "GRPOLossOutput", "grpo_loss"]

FWD = "vlmkernels::grpo_loss_fwd"

# The fields of Batch, then GRPOLossConfig.text.
define(
    FWD,
    "(Tensor logps, Tensor advantages, Tensor? old_logps, Tensor? ref_logps, Tensor? mask, Tensor? cu_seqlens,"
    " Tensor? rollout_logps, Tensor? entropy, Tensor? entropy_threshold, Tensor? num_items, float accumulation_steps,"
    " str config, str backend) -> (Tensor loss, Tensor dlogp, Tensor dentropy, Tensor stats)",
)


def _outputs(logps, config):
    """loss; the gradients by logps and, if there is an entropy bonus, entropy, without the scales; ``STATS``."""
    like_logps = lambda: torch.empty_like(logps, memory_format=torch.contiguous_format)  # noqa: E731
    dentropy = like_logps() if config.entropy_coef else logps.new_empty(0)
    return logps.new_empty(()), like_logps(), dentropy, logps.new_empty(len(STATS))


def _fwd(*args):
    batch, config, backend = Batch(*args[:-2]), parse(args[-2]), args[-1]
    check_values(batch)
    if config.check_finite:
        require_finite(batch)
    if config.top_entropy_quantile < 1 and batch.entropy_threshold is None:
        threshold = entropy_quantile(batch.entropy, batch.mask, 1 - config.top_entropy_quantile)
        batch = batch._replace(entropy_threshold=threshold)
    outputs = _outputs(batch.logps, config)
    select("grpo_loss", backend, batch.logps).fwd(batch, config, *outputs)
    return outputs


impl(FWD, "default", _fwd)


@register_fake(FWD)
def _fwd_fake(logps, *args):
    return _outputs(logps, parse(args[-2]))


LOGPS, ENTROPY = (1 + Batch._fields.index(name) for name in ("logps", "entropy"))  # among the arguments of _Loss


class _Loss(torch.autograd.Function):
    """The op, whose outputs hold its gradient. ``register_autograd`` costs 40 us more per call than this.
    https://pytorch.org/docs/stable/notes/extending.html"""

    @staticmethod
    def forward(ctx, divided_by_tokens, *args):
        fwd = torch.ops.vlmkernels.grpo_loss_fwd if needs_dispatcher(*args[:-3]) else _fwd
        loss, dlogp, dentropy, stats = fwd(*args)
        ctx.save_for_backward(dlogp, dentropy, stats)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.divided_by_tokens = divided_by_tokens
        return loss, stats

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, _):
        grads = [None] * (len(Batch._fields) + 3)
        if dloss is not None:
            dlogp, dentropy, stats = ctx.saved_tensors
            if ctx.needs_input_grad[LOGPS]:
                # policy_scale is 1 unless the loss is divided by the number of tokens.
                scale = stats[0] * dloss if ctx.divided_by_tokens else dloss
                # On the CPU reading the scale is free, and usually spares a pass over the gradient.
                readable = not torch.compiler.is_compiling() and dlogp.device.type == "cpu"
                grads[LOGPS] = dlogp if readable and scale.item() == 1 else dlogp * scale
            if ctx.needs_input_grad[ENTROPY] and dentropy.shape == dlogp.shape:
                grads[ENTROPY] = dentropy * (stats[1] * dloss)
        return tuple(grads)


class GRPOLossOutput(NamedTuple):
    """The scalar loss, differentiable, and detached scalar metrics on its device.

    Of the tokens given, whatever ``num_items``: policy_loss (without the entropy bonus), kl, entropy, clip_ratio/low_mean,
    low_min, high_mean, high_max and region_mean (cispo_clip_ratio, vespo/phi_seq_mean), defined as in TRL 1.16; beside them
    ratio/mean, min and max, sampling/importance_sampling_ratio/mean, tokens (that the mask holds) and effective_tokens
    (whose policy term counts). Those that the configuration gives no meaning are left out.
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


def grpo_loss(
    logps: torch.Tensor,
    advantages: torch.Tensor,
    *,
    old_logps: torch.Tensor | None = None,
    ref_logps: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    rollout_logps: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    entropy_threshold: torch.Tensor | float | None = None,
    num_items: torch.Tensor | float | None = None,
    accumulation_steps: float = 1,
    config: GRPOLossConfig = DEFAULT,
    backend: str = "auto",
) -> GRPOLossOutput:
    """Policy-gradient loss over the completion tokens of a batch; which one, ``config`` says.

    With the default, equivalent to::

        ratio = (logps - old_logps).exp()
        clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
        loss = -torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])
        loss = loss + beta * ((ref_logps - logps).exp() - (ref_logps - logps) - 1)
        loss = (loss * mask).sum() / num_items                                           # dapo

    The gradient is made in the forward pass; the backward pass multiplies it by a scalar. Everything is finite: log-ratios
    count as at most 20 either way, and log-probabilities as at least -1e4, in the loss and in its gradient. Nothing waits
    for the device, except with ``check_finite``.

    Args:
        logps: (B, T), the policy's log-probabilities; with cu_seqlens (N,), the completions one after another.
        advantages: (B,), or like ``logps`` per token. Packed and of one size, it is one per sequence.
        old_logps: like ``logps``, of the policy before this step; None: the policy itself, so that the ratio is 1.
        ref_logps: like ``logps``, of the reference model; needed, and read, when beta > 0.
        mask: (B, T) bool, true on the tokens that count, any of them; default all. Values elsewhere are not used.
        cu_seqlens: (B + 1,) int32: sequence s is [cu_seqlens[s], cu_seqlens[s + 1]), as in flash-attn.
        rollout_logps: like ``logps``, of the engine that sampled; needed by config.rollout_correction, and used by
            off_policy_mask_threshold. NaN: the engine gave none for this token, which is then not corrected. Of truncated
            sampling (top-p, ...) those of the draw or of the whole vocabulary: docs/mismatch.md says what each gives.
        entropy: like ``logps``: a metric; needed by top_entropy_quantile and entropy_coef.
        entropy_threshold: (), with top_entropy_quantile < 1: the least entropy that counts. Default: the quantile over this
            call's tokens; with several processes, that over theirs.
        num_items: for dapo, cispo and vespo: the tokens of all calls whose losses are added up, over all processes, divided
            by the number of processes; default those of this call. A number, or a () tensor.
        accumulation_steps: the calls whose losses are added up. What is a mean over this call's tokens, and not divided by
            num_items, is divided by it: the entropy bonus and the other losses.
        config: see ``GRPOLossConfig``.
        backend: see ``vlmkernels.backend``.

    Returns:
        ``GRPOLossOutput(loss, metrics)``. Computed in fp32 (fp64 for fp64 ``logps``, in the reference). A gradient goes to
        ``logps`` and, with entropy_coef, to ``entropy``.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or combination of arguments; on the CPU also cu_seqlens that are
            not increasing from 0 to N (on a GPU that check would wait for the device).
        RuntimeError: the gradient is differentiated.
        NotImplementedError: the named backend does not serve these tensors.

    Source: https://arxiv.org/abs/2402.03300, and those of ``vlmkernels.ops.grpo_loss.config.LOSSES``.
    """
    batch = Batch(
        logps,
        advantages,
        old_logps,
        ref_logps,
        mask,
        cu_seqlens,
        rollout_logps,
        entropy,
        entropy_threshold,
        num_items,
        accumulation_steps,
    )
    check_layout(batch)
    check_config(batch, config)
    batch = prepare(batch, config)
    loss, stats = _Loss.apply(batch.divides_by_tokens(config), *batch, config.text, resolve(backend))
    return GRPOLossOutput(loss, metrics(stats, batch, config))
