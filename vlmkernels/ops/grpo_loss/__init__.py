"""The GRPO objective from given log-probabilities. Imports only torch: triton and ``_C`` load on first use."""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.library import define, impl, register_fake

from vlmkernels.backend import resolve, select
from vlmkernels.ops.arguments import as_cu_seqlens, as_mask, as_tensor
from vlmkernels.ops.checks import require_tensor
from vlmkernels.ops.dispatch import needs_dispatcher, schema, unpack
from vlmkernels.ops.grpo_loss.check import check_config, check_layout, check_values, prepare
from vlmkernels.ops.grpo_loss.config import DEFAULT, GRPOLossConfig, as_config, parse
from vlmkernels.ops.grpo_loss.inputs import STATS, LossInputs, entropy_quantile, metrics, num_stats, require_finite

__all__ = ["GRPOLossConfig", "GRPOLossOutput", "grpo_loss"]

FWD = "vlmkernels::grpo_loss_fwd"


class Settings(NamedTuple):
    """The arguments of the operator after ``LossInputs``."""

    config: str  # GRPOLossConfig.text
    backend: str


class Outputs(NamedTuple):
    """The results of the forward pass."""

    loss: torch.Tensor  # ()
    dlogp: torch.Tensor  # like logps: the gradient without policy_scale
    dentropy: torch.Tensor  # like logps: the gradient without entropy_scale; (0,) without an entropy bonus
    dmasked: torch.Tensor  # like masked_logps: the gradient without policy_scale; (0,) without the terms of PAPO
    stats: torch.Tensor  # see STATS


define(FWD, f"({schema(LossInputs, Settings)}) -> ({schema(Outputs)})")


def _outputs(inputs: LossInputs, config: GRPOLossConfig) -> Outputs:
    logps = inputs.logps
    dlogp = torch.empty_like(logps, memory_format=torch.contiguous_format)
    dentropy = torch.empty_like(dlogp) if config.entropy_coef else logps.new_empty(0)
    dmasked = torch.empty_like(dlogp) if config.perception else logps.new_empty(0)
    return Outputs(logps.new_empty(()), dlogp, dentropy, dmasked, logps.new_empty(num_stats(config)))


def _run(inputs: LossInputs, config: GRPOLossConfig, backend: str) -> Outputs:
    check_values(inputs)
    if config.check_finite:
        require_finite(inputs)
    if config.top_entropy_quantile < 1 and inputs.entropy_threshold is None:
        assert inputs.entropy is not None
        threshold = entropy_quantile(inputs.entropy, inputs.loss_mask, 1 - config.top_entropy_quantile)
        inputs = inputs._replace(entropy_threshold=threshold)
    outputs = _outputs(inputs, config)
    select("grpo_loss", backend, inputs.logps).fwd(inputs, config, *outputs)
    return outputs


@impl(FWD, "default")
def _fwd(*args: Any) -> Outputs:
    inputs, settings = unpack(args, LossInputs, Settings)
    return _run(inputs, parse(settings.config), settings.backend)


def _fwd_fake(*args: Any) -> Outputs:
    inputs, settings = unpack(args, LossInputs, Settings)
    return _outputs(inputs, parse(settings.config))


register_fake(FWD, _fwd_fake)


class _Loss(torch.autograd.Function):
    """The loss with its gradients, which the forward operator computes; https://pytorch.org/docs/stable/notes/extending.html

    A call takes 40 us less than with ``register_autograd``. The fields of ``inputs`` that get gradients are arguments of their
    own so that autograd sees them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logps: torch.Tensor,
        entropy: torch.Tensor | None,
        masked_logps: torch.Tensor | None,
        inputs: LossInputs,
        config: GRPOLossConfig,
        backend: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = inputs._replace(logps=logps, entropy=entropy, masked_logps=masked_logps)
        if needs_dispatcher(*inputs.tensors):
            outputs = torch.ops.vlmkernels.grpo_loss_fwd(*inputs, *Settings(config.text, backend))
        else:
            outputs = _run(inputs, config, backend)
        loss, dlogp, dentropy, dmasked, stats = outputs
        ctx.save_for_backward(dlogp, dentropy, dmasked, stats)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.divided_by_tokens = inputs.divides_by_tokens(config)
        return loss, stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
        dlogps = dentropies = dmasked_logps = None
        if dloss is not None:
            dlogp, dentropy, dmasked, stats = ctx.saved_tensors
            needs_logps, needs_entropy, needs_masked, *_ = ctx.needs_input_grad
            # policy_scale is 1 unless the loss is divided by the number of tokens.
            scale = stats[STATS.index("policy_scale")] * dloss if ctx.divided_by_tokens else dloss
            # On the CPU reading the scale costs nothing, and it usually saves a pass over the gradient.
            readable = not torch.compiler.is_compiling() and dlogp.device.type == "cpu"
            is_one = readable and scale.item() == 1
            if needs_logps:
                dlogps = dlogp if is_one else dlogp * scale
            if needs_masked:
                dmasked_logps = dmasked if is_one else dmasked * scale
            if needs_entropy and dentropy.shape == dlogp.shape:
                dentropies = dentropy * (stats[STATS.index("entropy_scale")] * dloss)
        return dlogps, dentropies, dmasked_logps, None, None, None


class GRPOLossOutput(NamedTuple):
    """The scalar loss, which is differentiable, and detached scalar metrics on its device.

    The metrics describe only the tokens of this call, also if ``num_items`` is given. Defined as in TRL 1.16 are policy_loss
    (without the entropy bonus), kl, entropy, clip_ratio/low_mean, low_min, high_mean, high_max and region_mean,
    cispo_clip_ratio and vespo/phi_seq_mean. The others are ratio/mean, min and max, sampling/importance_sampling_ratio/mean,
    tokens (the sum of the loss mask) and effective_tokens (the number of tokens whose policy term is not masked); and, over the
    tokens that have masked images, perception/kl, perception/masked_entropy (the mean of -masked_logps), perception/clip_ratio
    (the share of tokens whose KL has reached its bound) and perception/tokens (their number). Metrics that have no meaning in
    the configuration are left out.
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


def grpo_loss(
    logps: torch.Tensor,
    advantages: torch.Tensor,
    *,
    old_logps: torch.Tensor | None = None,
    ref_logps: torch.Tensor | None = None,
    loss_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    rollout_logps: torch.Tensor | None = None,
    masked_logps: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    entropy_threshold: torch.Tensor | float | None = None,
    num_items: torch.Tensor | float | None = None,
    accumulation_steps: float = 1,
    config: GRPOLossConfig | str = DEFAULT,
    backend: str = "auto",
) -> GRPOLossOutput:
    """Compute the policy-gradient loss over the completion tokens of a batch. ``config`` selects the objective.

    With the default configuration, equivalent to::

        ratio = (logps - old_logps).exp()
        clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
        loss = -torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])
        loss = loss + beta * ((ref_logps - logps).exp() - (ref_logps - logps) - 1)
        loss = (loss * loss_mask).sum() / num_items                                      # dapo

    The forward pass computes the gradient; the backward pass multiplies it by a scalar. All results are finite: log-ratios are
    clamped to [-20, 20] and log-probabilities to at least -1e4, in the loss and in its gradient. Nothing waits for the device,
    except with ``check_finite``.

    Args:
        logps: (B, T), log-probabilities of the policy; with cu_seqlens (N,), the completions one after another.
        advantages: (B,), or per token in the shape of ``logps``. A packed (N,) tensor with N = B is read as one per sequence.
        old_logps: in the shape of ``logps``: log-probabilities of the policy before this step. None: the policy itself, so that
            the ratio is 1.
        ref_logps: in the shape of ``logps``: log-probabilities of the reference model. Required, and read, if beta > 0.
        loss_mask: (B, T) bool, or 0 and 1 in any dtype, true for the tokens in the loss; the other tokens may have any values,
            also NaN. Default: all tokens.
        cu_seqlens: (B + 1,) integers: sequence s is [cu_seqlens[s], cu_seqlens[s + 1]), as in flash-attn.
        rollout_logps: in the shape of ``logps``: log-probabilities of the engine that sampled. Required by
            config.rollout_correction, and used by off_policy_mask_threshold. A token is not corrected if its value is NaN,
            which means that the engine returned none. With truncated sampling (top-p, ...) they may be log-probabilities of
            the truncated distribution or of the whole vocabulary; docs/mismatch.md explains the difference.
        masked_logps: in the shape of ``logps``: log-probabilities of the policy given masked images. Required by
            config.perception_loss_weight, der_loss_weight1 and der_loss_weight2, whose terms cover all tokens of the loss mask.
            NaN means that a token has no masked images: its terms are 0.
        entropy: in the shape of ``logps``: reported as a metric; required by top_entropy_quantile and entropy_coef.
        entropy_threshold: a number or () tensor, with top_entropy_quantile < 1: tokens with a lower entropy are left out of the
            policy term. Default: the quantile over the tokens of this call. With several processes, pass the quantile over the
            tokens of all processes.
        num_items: a number or () tensor, for dapo, cispo and vespo: the tokens of all calls whose losses are added, over all
            processes, divided by the number of processes. Default: the tokens of this call.
        accumulation_steps: the number of calls whose losses are added. Means over the tokens of this call, that is the entropy
            bonus and losses without num_items, are divided by it. The loss of bnpo therefore depends on the cut of a batch.
        config: see ``GRPOLossConfig``; or the name of one of its presets.
        backend: see ``vlmkernels.backend``.

    Returns:
        ``GRPOLossOutput(loss, metrics)``. Computed in fp32 (in fp64 for fp64 ``logps``, which the reference supports).
        ``logps``, ``masked_logps`` and, with entropy_coef, ``entropy`` get gradients.

    Raises:
        ValueError, TypeError: a shape, dtype, device or combination of arguments is wrong, or (on the CPU) cu_seqlens do not
            increase from 0 to N. On a GPU this check would wait for the device.
        RuntimeError: the gradient is differentiated (double backward).
        NotImplementedError: the named backend does not support these tensors.

    Source: https://arxiv.org/abs/2402.03300, and the papers in ``vlmkernels.ops.grpo_loss.config.LOSSES``.
    """
    require_tensor("logps", logps)
    config = as_config(config)
    inputs = LossInputs(
        logps=logps,
        advantages=as_tensor("advantages", advantages, logps.device),
        old_logps=old_logps,
        ref_logps=ref_logps,
        loss_mask=as_mask("loss_mask", loss_mask, logps.device),
        cu_seqlens=None if cu_seqlens is None else as_cu_seqlens(cu_seqlens, logps.device),
        rollout_logps=rollout_logps,
        masked_logps=masked_logps,
        entropy=entropy,
        entropy_threshold=entropy_threshold,  # type: ignore[arg-type]  # prepare converts numbers
        num_items=num_items,  # type: ignore[arg-type]
        accumulation_steps=accumulation_steps,
    )
    check_layout(inputs)
    check_config(inputs, config)
    inputs = prepare(inputs, config)
    leaves = inputs.logps, inputs.entropy, inputs.masked_logps
    loss, stats = _Loss.apply(*leaves, inputs, config, resolve("grpo_loss", backend))
    return GRPOLossOutput(loss, metrics(stats, inputs, config))
