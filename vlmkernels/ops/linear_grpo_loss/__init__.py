"""The GRPO objective from hidden states and the head. Imports only torch: triton and ``_C`` load on first use."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.library import define, impl, register_fake

from vlmkernels.backend import resolve, select
from vlmkernels.ops.arguments import as_cu_seqlens, as_indices, as_mask, as_tensor, without_ignored
from vlmkernels.ops.checks import require_indices
from vlmkernels.ops.dispatch import schema, unpack
from vlmkernels.ops.grpo_loss import grpo_loss
from vlmkernels.ops.grpo_loss.check import check_config, check_layout, check_values, prepare
from vlmkernels.ops.grpo_loss.config import DEFAULT, GRPOLossConfig, as_config, parse
from vlmkernels.ops.grpo_loss.inputs import STATS, LossInputs, Sequences, metrics, num_stats, require_finite, token_weights
from vlmkernels.ops.linear_grpo_loss.tokens import Tokens
from vlmkernels.ops.linear_logps import linear_logps
from vlmkernels.ops.linear_logps.check import budget, check, check_logits, operands
from vlmkernels.ops.linear_logps.inputs import Operands, SelectedRows
from vlmkernels.ops.linear_logps.parallel import VocabParallel
from vlmkernels.ops.linear_logps.sweep import (
    Gradients,
    Head,
    Segments,
    Sweep,
    default_dlogits_bytes,
    empty_gradients,
    gradient_scale,
    is_scaled,
    result_dtype,
    select_results,
    selected_indices,
    write_results,
)

__all__ = ["LinearGRPOLossOutput", "linear_grpo_loss"]

FWD = "vlmkernels::linear_grpo_loss_fwd"
BWD = "vlmkernels::linear_grpo_loss_bwd"


class Settings(NamedTuple):
    """The arguments of the forward operator after ``Operands`` and ``LossInputs``.

    The operator computes the logps and the entropy itself. Those of ``LossInputs`` only give it their shape and dtype.
    """

    temperature: float
    logit_scale: float
    softcap: float | None
    chunk_bytes: int
    keep_logits_bytes: int
    needed: list[bool]  # whether hidden, weight and bias need gradients
    config: str  # GRPOLossConfig.text
    backend: str

    def keeps_dlogits(self, inputs: Operands) -> bool:
        """Whether the gradients of all logits are kept, so that the backward pass runs the GEMMs of the gradients."""
        return inputs.targets.numel() * len(inputs.weight) * inputs.hidden.itemsize <= self.keep_logits_bytes


class Outputs(NamedTuple):
    """The results of the forward operator. Those that are not needed have shape (0,)."""

    loss: torch.Tensor
    stats: torch.Tensor
    logps: torch.Tensor
    entropy: torch.Tensor
    dmasked: torch.Tensor  # the gradient of masked_logps, not yet multiplied by dloss
    scale: torch.Tensor  # (): with is_scaled, multiplies the gradients below
    dlogits: torch.Tensor  # with keeps_dlogits: the gradients of all logits, not yet multiplied by dloss
    dhidden: torch.Tensor  # without keeps_dlogits: the gradients of the operands, not yet multiplied by dloss
    dweight: torch.Tensor  # with is_scaled all three are fp32
    dbias: torch.Tensor


class Gradient(NamedTuple):
    """The arguments of the backward operator, which computes the gradients from ``dlogits``."""

    dloss: torch.Tensor  # with is_scaled divided by the scale of dlogits
    dlogits: torch.Tensor
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    loss_mask: torch.Tensor | None
    rows: torch.Tensor | None
    needed: list[bool]


define(FWD, f"({schema(Operands, LossInputs, Settings)}) -> ({schema(Outputs)})")
define(BWD, f"({schema(Gradient)}) -> (Tensor dhidden, Tensor dweight, Tensor dbias)")


def in_one_sweep(config: GRPOLossConfig) -> bool:
    """Return whether the gradient of a token's logits can be written right after they are read.

    This is so if the gradient depends only on that token.
    """
    per_token = config.level == "token" and config.loss.surrogate != "vespo"
    corrected = (config.rollout_correction or "token").startswith("token")
    return per_token and corrected and config.off_policy_mask_threshold is None and config.top_entropy_quantile == 1


def largest_weight(tokens: Tokens) -> float:
    """Return the largest weight of a token in the loss. On a GPU this waits for the weights."""
    return max(tokens.share.amax().item() if len(tokens.share) else 0.0, abs(tokens.entropy_scale))


@impl(FWD, "default")
@torch.no_grad()
def _fwd(*args: Any) -> Outputs:
    inputs, loss_inputs, settings = unpack(args, Operands, LossInputs, Settings)
    hidden, weight, bias, targets, mask, rows = inputs
    require_indices("targets", targets, len(weight), "the vocabulary", mask)
    if rows is not None:
        leading = hidden.shape[:-1]
        require_indices("rows", rows, leading.numel(), f"the rows of hidden {tuple(leading)}", mask)
    logps = torch.zeros_like(loss_inputs.logps, memory_format=torch.contiguous_format)
    entropy = torch.zeros_like(logps)
    loss_inputs, config = loss_inputs._replace(logps=logps, entropy=entropy), parse(settings.config)
    check_values(loss_inputs)
    selected, index = selected_indices(mask, rows)
    head = Head.from_operands(hidden, weight, bias, settings.temperature, settings.logit_scale, settings.softcap)
    kept = settings.keeps_dlogits(inputs)
    dlogits = hidden.new_empty(targets.numel() if kept else 0, len(weight))
    in_place = result_dtype(hidden) == hidden.dtype  # the gradient of a logit overwrites it
    sweep = Sweep(hidden, head, index, settings.chunk_bytes, dlogits if in_place else None)
    segments = None
    if not kept:
        segments = Segments(
            hidden,
            sweep,
            settings.needed,
            settings.keep_logits_bytes,
            repeated=rows is not None,
            weight_dtype=weight.dtype,
            in_fp32=is_scaled(hidden),
        )
    kernels = select("linear_grpo_loss", settings.backend, hidden)
    tokens = _tokens(loss_inputs, config, selected, sweep.num)
    scale = logps.new_empty(0)
    if is_scaled(hidden):
        number = gradient_scale(largest_weight(tokens))
        scale, tokens = logps.new_full((), number), tokens.scaled(number)
    results = SelectedRows(
        targets=select_results(selected, targets),
        logp=logps.new_empty(sweep.num),
        entropy=logps.new_empty(sweep.num),
        stats=logps.new_empty(sweep.num, 2),
    )
    for chunk, states, room in sweep:
        logits = sweep.logits(states, room)
        out = dlogits[chunk] if segments is None else segments.room(chunk, logits)
        kernels.sweep(logits, states, results.chunk(chunk), tokens.chunk(chunk), config, head, out)
        if segments is not None:
            segments.add(chunk, out)
    check_logits(hidden, results.stats)
    write_results(selected, logps, results.logp)
    write_results(selected, entropy, results.entropy)
    if config.check_finite:
        require_finite(loss_inputs)
    loss, stats, dlogp = logps.new_empty(()), logps.new_empty(num_stats(config)), torch.empty_like(logps)
    dentropy = torch.empty_like(logps) if config.entropy_coef else logps.new_empty(0)
    dmasked = torch.empty_like(logps) if config.perception else logps.new_empty(0)
    select("grpo_loss", settings.backend, logps).fwd(loss_inputs, config, loss, dlogp, dentropy, dmasked, stats)
    if config.perception:
        dmasked *= stats[STATS.index("policy_scale")]
    gradients = [hidden.new_empty(0) for _ in range(3)] if segments is None else segments.gradients.results()
    return Outputs(loss, stats, logps, entropy, dmasked, scale, dlogits, *gradients)


def _tokens(inputs: LossInputs, config: GRPOLossConfig, selected: torch.Tensor | None, num: int) -> Tokens:
    """Return the inputs of the kernels for the ``num`` selected tokens."""
    sequences = Sequences(inputs)
    share, factor = token_weights(inputs, config, sequences)
    advantages = inputs.advantages if inputs.per_token else sequences.per_token(inputs.advantages)
    policies = inputs.old_logps, inputs.ref_logps, inputs.rollout_logps, inputs.masked_logps
    old_logps, ref_logps, rollout_logps, masked_logps = (None if x is None else select_results(selected, x) for x in policies)
    return Tokens(
        advantages=select_results(selected, advantages),
        share=select_results(selected, share * factor),
        old_logps=old_logps,
        ref_logps=ref_logps,
        rollout_logps=rollout_logps,
        masked_logps=masked_logps,
        entropy_scale=-config.entropy_coef / (max(num, 1) * inputs.accumulation_steps),
    )


def _fwd_fake(*args: Any) -> Outputs:
    inputs, loss_inputs, settings = unpack(args, Operands, LossInputs, Settings)
    hidden, weight, kept = inputs.hidden, inputs.weight, settings.keeps_dlogits(inputs)
    logps = torch.empty_like(loss_inputs.logps, memory_format=torch.contiguous_format)
    dlogits = hidden.new_empty(inputs.targets.numel() if kept else 0, len(weight))
    scale = logps.new_empty(() if is_scaled(hidden) else 0)
    gradients = empty_gradients(hidden, weight, inputs.bias, [False] * 3 if kept else settings.needed, is_scaled(hidden))
    config = parse(settings.config)
    dmasked = logps.new_empty(logps.shape if config.perception else 0)
    results = logps.new_empty(()), logps.new_empty(num_stats(config)), logps, torch.empty_like(logps), dmasked
    return Outputs(*results, scale, dlogits, *gradients)


register_fake(FWD, _fwd_fake)


@impl(BWD, "default")
@torch.no_grad()
def _bwd(*args: Any) -> tuple[torch.Tensor, ...]:
    gradient = Gradient(*args)
    dloss, dlogits, hidden, weight = gradient.dloss, gradient.dlogits, gradient.hidden, gradient.weight
    _, index = selected_indices(gradient.loss_mask, gradient.rows)
    # The scaling of the logits is part of their gradients already.
    head = Head.from_operands(hidden, weight, gradient.bias, temperature=1.0, logit_scale=1.0, softcap=None)
    # On the CPU reading the scale costs nothing, and it usually saves a pass over the gradients.
    scale = None if dloss.device.type == "cpu" and dloss.item() == 1 else dloss
    gradients = Gradients(
        hidden,
        head,
        index,
        gradient.needed,
        repeated=gradient.rows is not None,
        weight_dtype=weight.dtype,
        scale=scale,
        in_fp32=is_scaled(hidden),
    )
    num = len(dlogits) if index is None else len(index)
    gradients.add(slice(0, num), dlogits[:num])
    return tuple(gradients.results())


def _bwd_fake(*args: Any) -> tuple[torch.Tensor, ...]:
    gradient = Gradient(*args)
    hidden = gradient.hidden
    return tuple(empty_gradients(hidden, gradient.weight, gradient.bias, gradient.needed, is_scaled(hidden)))


register_fake(BWD, _bwd_fake)


class _LinearGRPOLoss(torch.autograd.Function):
    """Both operators; https://pytorch.org/docs/stable/notes/extending.html

    ``hidden``, ``weight``, ``bias`` and ``masked_logps`` are arguments of their own, so that autograd sees them. The results of
    the forward pass that the backward pass uses, ``ctx.dlogits`` or ``ctx.gradients``, are not saved tensors: the backward pass
    overwrites or frees them, and hooks of saved tensors (offloading) would copy gigabytes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        masked_logps: torch.Tensor | None,
        inputs: Operands,
        loss_inputs: LossInputs,
        settings: Settings,
    ) -> tuple[torch.Tensor, ...]:
        inputs, loss_inputs = (
            inputs._replace(hidden=hidden, weight=weight, bias=bias),
            loss_inputs._replace(masked_logps=masked_logps),
        )
        outputs = Outputs(*torch.ops.vlmkernels.linear_grpo_loss_fwd(*inputs, *loss_inputs, *settings))
        ctx.needed, ctx.used, ctx.dmasked = settings.needed, False, outputs.dmasked
        ctx.dtypes = hidden.dtype, weight.dtype, weight.dtype
        ctx.scale = outputs.scale if is_scaled(hidden) else None
        if settings.keeps_dlogits(inputs):
            ctx.dlogits, ctx.gradients = outputs.dlogits, None
            ctx.save_for_backward(hidden, weight, bias, inputs.mask, inputs.rows)
        else:
            ctx.dlogits, ctx.gradients = None, [outputs.dhidden, outputs.dweight, outputs.dbias]
        ctx.mark_non_differentiable(outputs.stats, outputs.logps, outputs.entropy)
        ctx.set_materialize_grads(False)
        return outputs.loss, outputs.stats, outputs.logps, outputs.entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
        if dloss is None:
            return None, None, None, None, None, None, None
        if ctx.used:
            raise RuntimeError(
                "linear_grpo_loss supports one backward pass, which frees what the forward pass kept; for several passes use"
                " grpo_loss(linear_logps(...))"
            )
        dmasked = ctx.dmasked * dloss if ctx.needs_input_grad[3] else None
        dloss = dloss if ctx.scale is None else dloss / ctx.scale
        dlogits, gradients = ctx.dlogits, ctx.gradients
        ctx.dlogits, ctx.gradients, ctx.used = None, None, True
        if dlogits is not None:
            hidden, weight, bias, loss_mask, rows = ctx.saved_tensors
            gradient = Gradient(dloss, dlogits, hidden, weight, bias, loss_mask, rows, ctx.needed)
            gradients = torch.ops.vlmkernels.linear_grpo_loss_bwd(*gradient)
        elif torch.compiler.is_compiling() or dloss.device.type != "cpu" or dloss.item() != 1:
            gradients = [x.mul_(dloss) for x in gradients]
        results = zip(gradients, ctx.dtypes, ctx.needed, strict=True)
        dhidden, dweight, dbias = (x.to(dtype) if n else None for x, dtype, n in results)
        return dhidden, dweight, dbias, dmasked, None, None, None


class LinearGRPOLossOutput(NamedTuple):
    """The outputs of ``grpo_loss``, and the log-probabilities and entropies that it was computed from.

    ``logps`` and ``entropy`` are in the shape of ``targets``, fp32, and detached.
    """

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
    loss_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    rollout_logps: torch.Tensor | None = None,
    masked_logps: torch.Tensor | None = None,
    entropy_threshold: torch.Tensor | float | Callable[[torch.Tensor], torch.Tensor] | None = None,
    num_items: torch.Tensor | float | None = None,
    accumulation_steps: float = 1,
    config: GRPOLossConfig | str = DEFAULT,
    chunk_bytes: int | None = None,
    keep_logits_bytes: int | None = None,
    vocab_parallel: VocabParallel | None = None,
    backend: str = "auto",
) -> LinearGRPOLossOutput:
    """Compute ``grpo_loss`` from hidden states and the head, in one pass over the logits if the objective allows it.

    Equivalent to::

        logps, entropy = linear_logps(hidden, weight, targets, rows=rows, mask=loss_mask, return_entropy=True, ...)
        loss, metrics = grpo_loss(logps, advantages, entropy=entropy, loss_mask=loss_mask, ..., config=config)

    If the gradient of a token depends only on that token, the forward pass computes a chunk of logits by one GEMM and their
    gradient by one kernel: forward and backward take 6 N H V floating-point operations instead of the 8 N H V of computing
    logits twice, and 4 N H V if ``weight`` needs no gradient. If the gradients of all logits fit in ``keep_logits_bytes``, they
    are kept for the backward pass, which runs one GEMM each for ``hidden`` and ``weight``. Otherwise the forward pass runs
    these GEMMs segment by segment and accumulates the gradient of ``weight`` in fp32, (V, H), and the backward pass multiplies
    the results in place. In both cases there can be only one backward pass.

    With fp16 hidden states, the gradients of the logits are multiplied by a power of two before they are rounded, so that those
    of the largest weight of a token are about 256 times its advantage. The gradients of ``hidden``, ``weight`` and ``bias`` are
    divided by it, and multiplied by the upstream gradient, which has the loss scale as a factor, in fp32. They overflow if the
    derivative of a token's loss by its log-probability is more than about 255: |advantage| * ratio, and the derivatives of the
    KL and perception terms, such as beta * (e^(ref - logp) - 1) with kl_estimator="k3".

    Other objectives (sequence-level ratios or weights, off_policy_mask_threshold, top_entropy_quantile) and vocab_parallel run
    as written above. They also take 6 N H V operations if the logits fit in ``chunk_bytes``.

    Args:
        hidden, weight, bias, temperature, logit_scale, softcap, rows, chunk_bytes, vocab_parallel: see ``linear_logps``.
        targets: (B, T) integers, -100 for tokens that are not in the loss; with cu_seqlens (N,), without -100. ``hidden`` is
            (B, T, H) or (N, H), or any shape that ``rows`` index.
            Without cu_seqlens a GPU always gets a mask, because of -100, and each pass waits for it as in ``linear_logps``.
        advantages, old_logps, ref_logps, loss_mask, cu_seqlens, rollout_logps, masked_logps, num_items, accumulation_steps,
            config: see ``grpo_loss``. ``masked_logps`` are a result of ``linear_logps`` for the rows given masked images.
        entropy_threshold: see ``grpo_loss``; or a function that computes it from the entropies of the tokens in the loss mask,
            (N,).
        keep_logits_bytes: upper bound on the memory of logit gradients that are kept, in the dtype of ``hidden``. Default:
            2**32 on a GPU, or ``chunk_bytes`` if that is given; on the CPU ``chunk_bytes``, whose memory they use.
        backend: see ``vlmkernels.backend``.

    Returns:
        ``LinearGRPOLossOutput(loss, metrics, logps, entropy)``. ``hidden``, ``weight``, ``bias`` and ``masked_logps`` get
        gradients if they require them.

    Raises:
        ValueError, TypeError, NotImplementedError: as ``linear_logps`` and ``grpo_loss``.
        RuntimeError: a second backward pass.

    Source: https://arxiv.org/abs/2402.03300; computing gradients in the forward pass: https://arxiv.org/abs/2410.10989.
    """
    config = as_config(config)
    backend = resolve("linear_grpo_loss", backend)
    hidden, weight, bias = operands(hidden, weight, bias)
    needed = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    device = hidden.device
    targets = as_indices("targets", targets, device=device)
    rows = None if rows is None else as_indices("rows", rows, device=device)
    advantages, loss_mask = as_tensor("advantages", advantages, device), as_mask("loss_mask", loss_mask, device)
    if cu_seqlens is None:
        loss_mask = without_ignored(targets, loss_mask)
    else:
        cu_seqlens = as_cu_seqlens(cu_seqlens, device)
    loss_inputs: dict[str, Any] = {
        "advantages": advantages,
        "old_logps": old_logps,
        "ref_logps": ref_logps,
        "loss_mask": loss_mask,
        "cu_seqlens": cu_seqlens,
        "rollout_logps": rollout_logps,
        "masked_logps": masked_logps,
        "num_items": num_items,
        "accumulation_steps": accumulation_steps,
    }
    if not any(needed) or not in_one_sweep(config) or vocab_parallel is not None:
        logps, entropy = linear_logps(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            mask=loss_mask,
            rows=rows,
            return_entropy=True,
            chunk_bytes=chunk_bytes,
            keep_logits_bytes=keep_logits_bytes,
            vocab_parallel=vocab_parallel,
            backend=backend,
        )
        if callable(entropy_threshold):
            detached = entropy.detach()
            entropy_threshold = entropy_threshold(detached if loss_mask is None else detached[loss_mask])
        loss, metrics_ = grpo_loss(
            logps, entropy=entropy, entropy_threshold=entropy_threshold, config=config, backend=backend, **loss_inputs
        )
        return LinearGRPOLossOutput(loss, metrics_, logps.detach(), entropy.detach())
    inputs = Operands(hidden, weight, bias, targets, loss_mask, rows)
    check(inputs, temperature, logit_scale, softcap, mask_name="loss_mask")
    if keep_logits_bytes is None and chunk_bytes is None:
        keep_logits_bytes = default_dlogits_bytes(hidden.device)
    chunk_bytes, keep_logits_bytes = budget(inputs, chunk_bytes, keep_logits_bytes, backend)
    results = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    results = results.expand(targets.shape)  # stands for the log-probabilities and entropies
    checked = LossInputs(logps=results, entropy=results, entropy_threshold=None, **loss_inputs)
    check_layout(checked)
    check_config(checked, config)
    checked = prepare(checked, config)
    settings = Settings(
        temperature=float(temperature),
        logit_scale=float(logit_scale),
        softcap=None if softcap is None else float(softcap),
        chunk_bytes=chunk_bytes,
        keep_logits_bytes=keep_logits_bytes,
        needed=needed,
        config=config.text,
        backend=backend,
    )
    leaves = hidden, weight, bias, checked.masked_logps
    loss, stats, logps, entropy = _LinearGRPOLoss.apply(*leaves, inputs, checked, settings)
    return LinearGRPOLossOutput(loss, metrics(stats, checked, config), logps, entropy)
