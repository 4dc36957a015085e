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
from vlmkernels.ops.linear_logps.sweep import (
    Gradients,
    Head,
    Segments,
    Sweep,
    asked_for,
    default_dlogits_bytes,
    result_dtype,
    select_results,
)  # fmt: skip

__all__ = ["LinearGRPOLossOutput", "linear_grpo_loss"]

FWD = "vlmkernels::linear_grpo_loss_fwd"
BWD = "vlmkernels::linear_grpo_loss_bwd"


class Inputs(NamedTuple):
    """The arguments of the forward op, in the order of its schema."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    targets: torch.Tensor
    rows: torch.Tensor | None
    temperature: float
    logit_scale: float
    softcap: float | None
    chunk_bytes: int
    keep_logits_bytes: int
    advantages: torch.Tensor
    old_logps: torch.Tensor | None
    ref_logps: torch.Tensor | None
    mask: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    rollout_logps: torch.Tensor | None
    num_items: torch.Tensor | None
    accumulation_steps: float
    needed: list[bool]  # the gradients by hidden, weight, bias
    config: str  # GRPOLossConfig.text
    backend: str

    @property
    def keeps_dlogits(self) -> bool:
        """Whether the gradients by all logits are kept, so that the GEMMs of the gradients run in the backward pass."""
        return self.targets.numel() * len(self.weight) * self.hidden.itemsize <= self.keep_logits_bytes

    def batch(self, logps: torch.Tensor, entropy: torch.Tensor) -> Batch:
        return Batch(
            logps,
            self.advantages,
            self.old_logps,
            self.ref_logps,
            self.mask,
            self.cu_seqlens,
            self.rollout_logps,
            entropy,
            entropy_threshold=None,
            num_items=self.num_items,
            accumulation_steps=self.accumulation_steps,
        )


# If the gradients by all logits are kept, the forward op returns them as `dlogits`, and the backward op computes the other
# gradients. Otherwise the forward op returns those, not yet multiplied by dloss. Outputs that are not needed have shape (0,).
define(
    FWD,
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? rows, float temperature, float logit_scale,"
    " float? softcap, int chunk_bytes, int keep_logits_bytes, Tensor advantages, Tensor? old_logps, Tensor? ref_logps,"
    " Tensor? mask, Tensor? cu_seqlens, Tensor? rollout_logps, Tensor? num_items, float accumulation_steps,"
    " bool[] needed, str config, str backend)"
    " -> (Tensor loss, Tensor stats, Tensor logps, Tensor entropy, Tensor dlogits, Tensor dhidden, Tensor dweight,"
    " Tensor dbias)",
)
define(
    BWD,
    "(Tensor dloss, Tensor dlogits, Tensor hidden, Tensor weight, Tensor? bias, Tensor? mask, Tensor? rows, bool[] needed)"
    " -> (Tensor dhidden, Tensor dweight, Tensor dbias)",
)


def in_one_sweep(config: GRPOLossConfig, dtype: torch.dtype) -> bool:
    """Whether the gradient of a token depends on that token alone, so that it can be written while its logits are at hand.

    Not in fp16, whose small numbers need the factor of the loss before they are rounded.
    """
    per_token = config.level == "token" and config.loss.surrogate != "vespo"
    corrected = (config.rollout_correction or "token").startswith("token")
    fits = dtype != torch.float16
    return fits and per_token and corrected and config.off_policy_mask_threshold is None and config.top_entropy_quantile == 1


@impl(FWD, "default")
@torch.no_grad()
def _fwd(*args):
    inputs = Inputs(*args)
    hidden, weight, targets, mask, rows = inputs.hidden, inputs.weight, inputs.targets, inputs.mask, inputs.rows
    require_indices("targets", targets, len(weight), "the vocabulary", mask)
    if rows is not None:
        require_indices("rows", rows, hidden.shape[:-1].numel(), f"the rows of hidden {tuple(hidden.shape[:-1])}", mask)
    logps = torch.zeros(targets.shape, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    entropy = torch.zeros_like(logps)
    batch, config = inputs.batch(logps, entropy), parse(inputs.config)
    check_values(batch)
    asked, index = asked_for(mask, rows)
    head = Head.of(hidden, weight, inputs.bias, inputs.temperature, inputs.logit_scale, inputs.softcap)
    kept = inputs.keeps_dlogits
    dlogits = hidden.new_empty(targets.numel() if kept else 0, len(weight))
    in_place = result_dtype(hidden) == hidden.dtype  # the gradient by a logit overwrites it
    sweep = Sweep(hidden, head, index, inputs.chunk_bytes, dlogits if in_place else None)
    segments = None
    if not kept:
        options = {"repeated": rows is not None, "weight_dtype": weight.dtype}
        segments = Segments(hidden, sweep, inputs.needed, inputs.keep_logits_bytes, **options)
    kernels = select("linear_grpo_loss", inputs.backend, hidden)
    tokens = _tokens(batch, config, targets, asked, sweep.num)
    results = logps.new_empty(2, sweep.num)
    for chunk, states, room in sweep:
        logits = sweep.logits(states, room)
        out = dlogits[chunk] if kept else segments.room(chunk, logits)
        kernels.sweep(logits, states, tokens.cut(chunk), config, head, results[0, chunk], results[1, chunk], out)
        if not kept:
            segments.add(chunk, out)
    for out, result in zip((logps, entropy), results, strict=True):
        out.view(-1).copy_(result) if asked is None else out.view(-1).index_copy_(0, asked, result)
    if config.check_finite:
        require_finite(batch)
    loss, stats, dlogp = logps.new_empty(()), logps.new_empty(len(STATS)), torch.empty_like(logps)
    dentropy = torch.empty_like(logps) if config.entropy_coef else logps.new_empty(0)
    select("grpo_loss", inputs.backend, logps).fwd(batch, config, loss, dlogp, dentropy, stats)
    gradients = [hidden.new_empty(0) for _ in range(3)] if kept else segments.gradients.results()
    return loss, stats, logps, entropy, dlogits, *gradients


def _tokens(batch: Batch, config: GRPOLossConfig, targets, asked, num: int) -> Tokens:
    sequences = Sequences(batch)
    share, factor = token_weights(batch, config, sequences)
    advantages = batch.advantages if batch.per_token else sequences.per_token(batch.advantages)
    inputs = (targets, advantages, share * factor, batch.old_logps, batch.ref_logps, batch.rollout_logps)
    entropy_scale = -config.entropy_coef / (max(num, 1) * batch.accumulation_steps)
    return Tokens(*select_results(asked, *inputs), entropy_scale)


def _empty_gradients(hidden, weight, bias, needed) -> list[torch.Tensor]:
    like = (hidden, weight, weight if bias is None else weight.new_empty(bias.shape))
    return [x.new_empty(x.shape if n else 0) for x, n in zip(like, needed, strict=True)]


@register_fake(FWD)
def _fwd_fake(*args):
    inputs = Inputs(*args)
    hidden, weight = inputs.hidden, inputs.weight
    logps = hidden.new_empty(inputs.targets.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
    kept = inputs.keeps_dlogits
    dlogits = hidden.new_empty(inputs.targets.numel() if kept else 0, len(weight))
    gradients = _empty_gradients(hidden, weight, inputs.bias, [False] * 3 if kept else inputs.needed)
    return logps.new_empty(()), logps.new_empty(len(STATS)), logps, torch.empty_like(logps), dlogits, *gradients


@impl(BWD, "default")
@torch.no_grad()
def _bwd(dloss, dlogits, hidden, weight, bias, mask, rows, needed):
    _, index = asked_for(mask, rows)
    head = Head.of(hidden, weight, bias, 1.0, 1.0, None)
    # On the CPU reading the scale is free, and usually spares a pass over the gradients.
    scale = None if dloss.device.type == "cpu" and dloss.item() == 1 else dloss
    gradients = Gradients(hidden, head, index, needed, repeated=rows is not None, weight_dtype=weight.dtype, scale=scale)
    num = len(dlogits) if index is None else len(index)
    gradients.add(slice(0, num), dlogits[:num])
    return tuple(gradients.results())


@register_fake(BWD)
def _bwd_fake(dloss, dlogits, hidden, weight, bias, mask, rows, needed):
    return tuple(_empty_gradients(hidden, weight, bias, needed))


class _LinearGRPOLoss(torch.autograd.Function):
    """Both ops. https://pytorch.org/docs/stable/notes/extending.html

    ``ctx.made``, the gradients by the logits or by the inputs, is not a saved tensor: the backward pass consumes it, and
    hooks of saved tensors (offloading) would copy gigabytes.
    """

    @staticmethod
    def forward(ctx, *args):
        inputs = Inputs(*args)
        loss, stats, logps, entropy, dlogits, *gradients = torch.ops.vlmkernels.linear_grpo_loss_fwd(*args)
        ctx.needed, ctx.made = inputs.needed, dlogits if inputs.keeps_dlogits else gradients
        if inputs.keeps_dlogits:
            ctx.save_for_backward(inputs.hidden, inputs.weight, inputs.bias, inputs.mask, inputs.rows)
        ctx.mark_non_differentiable(stats, logps, entropy)
        ctx.set_materialize_grads(False)
        ctx.others = (None,) * (len(args) - 3)
        return loss, stats, logps, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss, *_):
        if dloss is None:
            return (None, None, None, *ctx.others)
        made, ctx.made = ctx.made, None
        if made is None:
            raise RuntimeError(
                "linear_grpo_loss has one backward pass, which frees what the forward pass kept; for several, use"
                " grpo_loss(linear_logps(...))"
            )
        if isinstance(made, torch.Tensor):
            made = torch.ops.vlmkernels.linear_grpo_loss_bwd(dloss, made, *ctx.saved_tensors, ctx.needed)
        elif torch.compiler.is_compiling() or dloss.device.type != "cpu" or dloss.item() != 1:
            made = [gradient.mul_(dloss) for gradient in made]
        return (*(g if n else None for g, n in zip(made, ctx.needed, strict=True)), *ctx.others)


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

    Where the gradient of a token depends on that token alone, the forward pass computes a chunk of logits by one GEMM and
    their gradient by one kernel: 6 N H V floating-point operations, forward and backward, instead of the 8 of recomputing,
    and 4 where ``weight`` needs no gradient. Where the gradients by all logits fit in ``keep_logits_bytes``, they are kept for
    the backward pass, which runs one GEMM each for ``hidden`` and ``weight``. Otherwise the forward pass runs those GEMMs
    segment by segment, accumulating the gradient by ``weight`` in fp32, (V, H), and the backward pass scales the results in
    place. Either way there can be only one backward pass.

    Other objectives (sequence-level ratios or weights, off_policy_mask_threshold, top_entropy_quantile), vocab_parallel and
    fp16 (whose small gradients need the loss scale before they are rounded) run as written above: also 6 N H V where the
    logits fit in ``chunk_bytes``.

    Args:
        hidden, weight, bias, temperature, logit_scale, softcap, rows, chunk_bytes, vocab_parallel: see ``linear_logps``.
        keep_logits_bytes: upper bound on the memory of the gradients by logits that are kept, in the dtype of ``hidden``.
            Default: 2**32 on a GPU, or ``chunk_bytes`` where that is given; on the CPU ``chunk_bytes``, whose memory they take.
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
    objective = {
        "advantages": advantages,
        "old_logps": old_logps,
        "ref_logps": ref_logps,
        "mask": mask,
        "cu_seqlens": cu_seqlens,
        "rollout_logps": rollout_logps,
        "num_items": num_items,
        "accumulation_steps": accumulation_steps,
    }
    shared = {"bias": bias, "temperature": temperature, "logit_scale": logit_scale, "softcap": softcap, "rows": rows}
    if not any(needed) or not in_one_sweep(config, hidden.dtype) or vocab_parallel is not None:
        logps, entropy = linear_logps(
            hidden, weight, targets, **shared, mask=mask, return_entropy=True, chunk_bytes=chunk_bytes,
            keep_logits_bytes=keep_logits_bytes, vocab_parallel=vocab_parallel, backend=backend,
        )  # fmt: skip
        if callable(entropy_threshold):
            entropy_threshold = entropy_threshold(entropy.detach() if mask is None else entropy.detach()[mask])
        batch = Batch(logps, entropy=entropy, entropy_threshold=entropy_threshold, **objective)
        loss, metrics_ = grpo_loss(**batch._asdict(), config=config, backend=backend)
        return LinearGRPOLossOutput(loss, metrics_, logps.detach(), entropy.detach())
    check(hidden, weight, bias, targets, mask, rows, temperature, logit_scale, softcap)
    if keep_logits_bytes is None and chunk_bytes is None:
        keep_logits_bytes = default_dlogits_bytes(hidden.device)
    chunk_bytes, keep_logits_bytes = budget(hidden, weight, bias, targets.numel(), chunk_bytes, keep_logits_bytes, backend)
    results = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    results = results.expand(targets.shape)  # in the place of the log-probabilities and entropies to come
    batch = Batch(results, entropy=results, entropy_threshold=None, **objective)
    check_layout(batch)
    check_config(batch, config)
    batch = prepare(batch, config)
    inputs = Inputs(
        hidden=hidden,
        weight=weight,
        bias=bias,
        targets=targets,
        rows=rows,
        temperature=float(temperature),
        logit_scale=float(logit_scale),
        softcap=None if softcap is None else float(softcap),
        chunk_bytes=chunk_bytes,
        keep_logits_bytes=keep_logits_bytes,
        advantages=batch.advantages,
        old_logps=batch.old_logps,
        ref_logps=batch.ref_logps,
        mask=batch.mask,
        cu_seqlens=batch.cu_seqlens,
        rollout_logps=batch.rollout_logps,
        num_items=batch.num_items,
        accumulation_steps=batch.accumulation_steps,
        needed=needed,
        config=config.text,
        backend=backend,
    )
    loss, stats, logps, entropy = _LinearGRPOLoss.apply(*inputs)
    return LinearGRPOLossOutput(loss, metrics(stats, batch, config), logps, entropy)
