"""The GRPO objective from hidden states and the language-model head. Torch only: backends load on first use."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.library import define, impl, register_fake

from vlmkernels.backend import resolve, select
from vlmkernels.ops.checks import require, require_indices
from vlmkernels.ops.grpo_loss import grpo_loss
from vlmkernels.ops.grpo_loss.batch import STATS, Batch, Sequences, metrics, require_finite, token_weights
from vlmkernels.ops.grpo_loss.check import check_config, check_layout, check_values, prepare
from vlmkernels.ops.grpo_loss.config import DEFAULT, GRPOLossConfig, parse
from vlmkernels.ops.linear_grpo_loss.tokens import Tokens
from vlmkernels.ops.linear_logps import linear_logps
from vlmkernels.ops.linear_logps.check import budget, check, operands
from vlmkernels.ops.linear_logps.parallel import VocabParallel
from vlmkernels.ops.linear_logps.sweep import Gradients, Head, Sweep, asked_for, narrowed, select_results

__all__ = ["LinearGRPOLossOutput", "linear_grpo_loss"]

FWD = "vlmkernels::linear_grpo_loss_fwd"

# The arguments of linear_logps, those of Batch but for what is a result here or belongs to other objectives, and
# GRPOLossConfig.text. The
# gradients that are not needed are (0,); all are those of the loss, still to be multiplied by its own.
define(
    FWD,
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? rows, float temperature, float logit_scale,"
    " float? softcap, int chunk_bytes, Tensor advantages, Tensor? old_logps, Tensor? ref_logps, Tensor? mask,"
    " Tensor? cu_seqlens, Tensor? rollout_logps, Tensor? num_items, float accumulation_steps,"
    " bool[] needed, str config, str backend)"
    " -> (Tensor loss, Tensor stats, Tensor logps, Tensor entropy, Tensor dhidden, Tensor dweight, Tensor dbias)",
)


def in_one_sweep(config: GRPOLossConfig, dtype: torch.dtype) -> bool:
    """Whether the gradient of a token is known from it alone, so that it can be written while its logits are at hand.

    Not in fp16, whose small numbers need the factor of the loss before they are rounded.
    """
    per_token = config.level == "token" and config.loss.surrogate != "vespo"
    corrected = (config.rollout_correction or "token").startswith("token")
    fits = dtype != torch.float16
    return fits and per_token and corrected and config.off_policy_mask_threshold is None and config.top_entropy_quantile == 1


@impl(FWD, "default")
@torch.no_grad()
def _fwd(
    hidden, weight, bias, targets, rows, temperature, logit_scale, softcap, chunk_bytes, advantages, old_logps, ref_logps, mask,
    cu_seqlens, rollout_logps, num_items, accumulation_steps, needed, config, backend,
):  # fmt: skip
    require_indices("targets", targets, len(weight), "the vocabulary", mask)
    if rows is not None:
        require_indices("rows", rows, hidden.shape[:-1].numel(), f"the rows of hidden {tuple(hidden.shape[:-1])}", mask)
    logps = torch.zeros(targets.shape, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    entropy = torch.zeros_like(logps)
    batch = Batch(
        logps, advantages, old_logps, ref_logps, mask, cu_seqlens, rollout_logps, entropy, None, num_items, accumulation_steps
    )
    config = parse(config)
    check_values(batch)
    asked, index = asked_for(mask, rows)
    head = Head.of(hidden, weight, bias, temperature, logit_scale, softcap)
    sweep = Sweep(hidden, head, index, chunk_bytes)
    gradients = Gradients(sweep, needed, repeated=rows is not None, weight_dtype=weight.dtype)
    rows_of = select("linear_grpo_loss", backend, hidden)
    tokens = _tokens(batch, config, targets, asked, sweep.num)
    results = logps.new_empty(2, sweep.num)
    for chunk, states, room in sweep:
        logits = sweep.logits(states, room)
        out = narrowed(logits, hidden.dtype)
        rows_of.sweep(logits, states, tokens.cut(chunk), config, head, results[0, chunk], results[1, chunk], out)
        gradients.add(chunk, states, out)
    for out, result in zip((logps, entropy), results, strict=True):
        out.view(-1).copy_(result) if asked is None else out.view(-1).index_copy_(0, asked, result)
    if config.check_finite:
        require_finite(batch)
    loss, stats, dlogp = logps.new_empty(()), logps.new_empty(len(STATS)), torch.empty_like(logps)
    dentropy = torch.empty_like(logps) if config.entropy_coef else logps.new_empty(0)
    select("grpo_loss", backend, logps).fwd(batch, config, loss, dlogp, dentropy, stats)
    return loss, stats, logps, entropy, *gradients.results()


def _tokens(batch: Batch, config: GRPOLossConfig, targets, asked, num: int) -> Tokens:
    sequences = Sequences(batch)
    share, factor = token_weights(batch, config, sequences)
    advantages = batch.advantages if batch.per_token else sequences.per_token(batch.advantages)
    inputs = (targets, advantages, share * factor, batch.old_logps, batch.ref_logps, batch.rollout_logps)
    entropy_scale = -config.entropy_coef / (max(num, 1) * batch.accumulation_steps)
    return Tokens(*select_results(asked, *inputs), entropy_scale)


@register_fake(FWD)
def _fwd_fake(hidden, weight, bias, targets, *args):
    logps = torch.empty(targets.shape, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    like = (hidden, weight, hidden if bias is None else bias)
    fresh = lambda x: torch.empty_like(x, memory_format=torch.contiguous_format)  # noqa: E731
    gradients = [fresh(x) if n else hidden.new_empty(0) for x, n in zip(like, args[-3], strict=True)]
    return logps.new_empty(()), logps.new_empty(len(STATS)), logps, torch.empty_like(logps), *gradients


class _LinearGRPOLoss(torch.autograd.Function):
    """The op, whose outputs hold its gradients. https://pytorch.org/docs/stable/notes/extending.html"""

    @staticmethod
    def forward(ctx, *args):
        loss, stats, logps, entropy, *ctx.gradients = torch.ops.vlmkernels.linear_grpo_loss_fwd(*args)
        ctx.mark_non_differentiable(stats, logps, entropy)
        ctx.set_materialize_grads(False)
        ctx.others = (None,) * (len(args) - 3)
        return loss, stats, logps, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss, *_):
        if dloss is None:
            return (None, None, None, *ctx.others)
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "linear_grpo_loss has one backward pass, in which its gradients are scaled in place; for several, use"
                " grpo_loss(linear_logps(...))"
            )
        gradients = [g if n else None for g, n in zip(gradients, ctx.needs_input_grad, strict=False)]
        # On the CPU a look at the scale is free, and mostly spares a pass over the gradients.
        looked_at = dloss.device.type == "cpu" and not torch.compiler.is_compiling()
        if not (looked_at and dloss.item() == 1):
            gradients = [g if g is None else g.mul_(dloss) for g in gradients]
        return (*gradients, *ctx.others)


class LinearGRPOLossOutput(NamedTuple):
    """``grpo_loss``'s outputs, and the log-probabilities and entropies they are of: like ``targets``, fp32, detached."""

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]
    logps: torch.Tensor
    entropy: torch.Tensor


def linear_grpo_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    advantages: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    rows: torch.Tensor | None = None,
    old_logps: torch.Tensor | None = None,
    ref_logps: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    rollout_logps: torch.Tensor | None = None,
    entropy_threshold: torch.Tensor | float | Callable[[torch.Tensor], torch.Tensor] | None = None,
    num_items: torch.Tensor | float | None = None,
    accumulation_steps: float = 1,
    config: GRPOLossConfig = DEFAULT,
    chunk_bytes: int | None = None,
    keep_logits_bytes: int | None = None,
    vocab_parallel: VocabParallel | None = None,
    backend: str = "auto",
) -> LinearGRPOLossOutput:
    """``grpo_loss`` of ``linear_logps``, in one sweep over the logits where the objective allows it.

    Equivalent to::

        logps, entropy = linear_logps(hidden, weight, targets, rows=rows, mask=mask, return_entropy=True, ...)
        loss, metrics = grpo_loss(logps, advantages, entropy=entropy, mask=mask, ..., config=config)

    Where the gradient of a token is known from it alone, a chunk of logits is made by a GEMM, overwritten by its gradient by
    one kernel, and multiplied into the gradients by ``hidden`` and ``weight``: 6 N H V floating-point operations, forward and
    backward, instead of the 8 of recomputing, and 4 where ``weight`` needs no gradient. The backward pass multiplies the
    gradients by a scalar on the device, in place: there can be one. Other objectives (a ratio or weight of the sequence,
    off_policy_mask_threshold, top_entropy_quantile), vocab_parallel, and fp16, whose small numbers need the loss scale before
    they are rounded, run as written above: also 6 N H V where the logits fit in ``chunk_bytes``.

    Args:
        hidden, weight, bias, temperature, logit_scale, softcap, rows, chunk_bytes, keep_logits_bytes, vocab_parallel: see
            ``linear_logps``. With several chunks the gradient by a 16-bit ``weight`` is added up in fp32, (V, H).
        targets: (B, T) int64; with cu_seqlens (N,). ``hidden`` is (B, T, H) or (N, H), or anything that ``rows`` points into.
        advantages, old_logps, ref_logps, mask, cu_seqlens, rollout_logps, entropy_threshold, num_items, accumulation_steps,
            config: see ``grpo_loss``. The entropy is always there; entropy_threshold may also be a function that makes it of
            the entropies of the tokens that count, (N,).
        backend: see ``vlmkernels.backend``.

    Returns:
        ``LinearGRPOLossOutput(loss, metrics, logps, entropy)``. Gradients go to ``hidden``, ``weight`` and ``bias``, each only
        where it requires one.

    Raises:
        ValueError, TypeError, NotImplementedError: as ``linear_logps`` and ``grpo_loss``.
        RuntimeError: a second backward pass.

    Source: https://arxiv.org/abs/2402.03300; gradients made in the forward pass: https://arxiv.org/abs/2410.10989.
    """
    require(isinstance(config, GRPOLossConfig), "config", "be a GRPOLossConfig", type(config).__name__, TypeError)
    backend = resolve(backend)
    hidden, weight, bias = operands(hidden, weight, bias)
    needed = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    shared = {"bias": bias, "temperature": temperature, "logit_scale": logit_scale, "softcap": softcap, "rows": rows}
    inputs = (advantages, old_logps, ref_logps, mask, cu_seqlens, rollout_logps)
    if not any(needed) or not in_one_sweep(config, hidden.dtype) or vocab_parallel is not None:
        logps, entropy = linear_logps(
            hidden, weight, targets, **shared, mask=mask, return_entropy=True, chunk_bytes=chunk_bytes,
            keep_logits_bytes=keep_logits_bytes, vocab_parallel=vocab_parallel, backend=backend,
        )  # fmt: skip
        if callable(entropy_threshold):
            entropy_threshold = entropy_threshold(entropy.detach() if mask is None else entropy.detach()[mask])
        batch = Batch(logps, *inputs, entropy, entropy_threshold, num_items, accumulation_steps)
        loss, metrics_ = grpo_loss(**batch._asdict(), config=config, backend=backend)
        return LinearGRPOLossOutput(loss, metrics_, logps.detach(), entropy.detach())
    check(hidden, weight, bias, targets, mask, rows, temperature, logit_scale, softcap)
    chunk_bytes, _ = budget(hidden, weight, bias, targets.numel(), chunk_bytes, keep_logits_bytes, backend)
    results = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    results = results.expand(targets.shape)  # in the place of the log-probabilities and entropies to come
    batch = Batch(results, *inputs, results, None, num_items, accumulation_steps)
    check_layout(batch)
    check_config(batch, config)
    batch = prepare(batch, config)
    loss, stats, logps, entropy = _LinearGRPOLoss.apply(
        hidden, weight, bias, targets, rows, float(temperature), float(logit_scale),
        None if softcap is None else float(softcap), chunk_bytes, *batch[1:7], *batch[9:], needed, config.text, backend,
    )  # fmt: skip
    return LinearGRPOLossOutput(loss, metrics(stats, batch, config), logps, entropy)
