"""Log-probabilities of tokens from hidden states and the head. Imports only torch: triton and ``_C`` load on first use."""

from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch.library import define, impl, register_fake

from vlmkernels.backend import resolve, select
from vlmkernels.ops.arguments import as_indices, as_mask, is_readable, without_ignored
from vlmkernels.ops.checks import require_indices
from vlmkernels.ops.dispatch import schema, unpack
from vlmkernels.ops.linear_logps.check import budget, check, check_logits, check_parallel, operands
from vlmkernels.ops.linear_logps.inputs import Gradient, Operands, Outputs, SelectedRows, Settings
from vlmkernels.ops.linear_logps.parallel import VocabParallel, gathered
from vlmkernels.ops.linear_logps.sweep import (
    Head,
    Segments,
    Sweep,
    default_dlogits_bytes,
    empty_gradients,
    flat,
    local_targets,
    result_dtype,
    row_bytes,
    select_results,
    selected_indices,
    write_results,
)

__all__ = ["VocabParallel", "linear_logps"]

FWD = "vlmkernels::linear_logps_fwd"
BWD = "vlmkernels::linear_logps_bwd"

define(FWD, f"({schema(Operands, Settings)}) -> ({schema(Outputs)})")
# A gradient that is not needed, or is added to weight_grad, is returned with shape (0,).
define(
    BWD,
    f"({schema(Gradient, Operands, Settings, mutates=('kept', 'weight_grad'))})"
    " -> (Tensor dhidden, Tensor dweight, Tensor dbias)",
)


def _outputs(inputs: Operands, settings: Settings) -> Outputs:
    hidden, weight, targets = inputs.hidden, inputs.weight, inputs.targets
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logp = torch.zeros(targets.shape, dtype=wide, device=hidden.device)
    most = settings.keep_logits_bytes // max(row_bytes(hidden, len(weight)), 1)
    kept = torch.empty((min(targets.numel(), most), len(weight)), dtype=result_dtype(hidden), device=hidden.device)
    return Outputs(logp, torch.zeros_like(logp), logp.new_zeros((*targets.shape, 2)), kept)


def _head(inputs: Operands, settings: Settings) -> Head:
    return Head.from_operands(
        inputs.hidden, inputs.weight, inputs.bias, settings.temperature, settings.logit_scale, settings.softcap
    )


def _selected_targets(selected: torch.Tensor | None, inputs: Operands, settings: Settings) -> torch.Tensor:
    targets = local_targets(inputs.targets, settings.vocab_start, len(inputs.weight), settings.vocab_size)
    return select_results(selected, targets)


@impl(FWD, "default")
@torch.no_grad()
def _fwd(*args: Any) -> Outputs:
    inputs, settings = unpack(args, Operands, Settings)
    hidden, mask, rows = inputs.hidden, inputs.mask, inputs.rows
    require_indices("targets", inputs.targets, settings.vocab_size, "the vocabulary", mask)
    if rows is not None:
        leading = hidden.shape[:-1]
        require_indices("rows", rows, leading.numel(), f"the rows of hidden {tuple(leading)}", mask)
    outputs = _outputs(inputs, settings)
    head = _head(inputs, settings)
    selected, index = selected_indices(mask, rows)
    targets = _selected_targets(selected, inputs, settings)
    num = len(targets)
    results = SelectedRows(
        targets, outputs.logp.new_empty(num), outputs.entropy.new_empty(num), outputs.stats.new_empty(num, 2)
    )
    if settings.chunk_bytes == 0:
        select("linear_logps_fused", settings.backend, hidden).fwd(flat(hidden), index, results, head)
    else:
        kernels = select("linear_logps", settings.backend, hidden)
        sweep = Sweep(hidden, head, index, settings.chunk_bytes, outputs.kept)
        for chunk, states, room in sweep:
            kernels.fwd(sweep.logits(states, room), states, results.chunk(chunk), head)
    check_logits(hidden, results.stats)
    for out, result in (
        (outputs.logp, results.logp),
        (outputs.entropy, results.entropy),
        (outputs.stats, results.stats),
    ):
        write_results(selected, out, result)
    return outputs


def _fwd_fake(*args: Any) -> Outputs:
    return _outputs(*unpack(args, Operands, Settings))


register_fake(FWD, _fwd_fake)


@impl(BWD, "default")
@torch.no_grad()
def _bwd(*args: Any) -> tuple[torch.Tensor, ...]:
    gradient, inputs, settings = unpack(args, Gradient, Operands, Settings)
    hidden = inputs.hidden
    selected, index = selected_indices(inputs.mask, inputs.rows)
    results = SelectedRows(
        targets=_selected_targets(selected, inputs, settings),
        logp=select_results(selected, gradient.logp),
        entropy=select_results(selected, gradient.entropy),
        stats=select_results(selected, gradient.stats, columns=2),
        dlogp=select_results(selected, gradient.dlogp),
        dentropy=None if gradient.dentropy is None else select_results(selected, gradient.dentropy),
    )
    head = _head(inputs, settings)
    kernels = select("linear_logps", settings.backend, hidden)
    sweep = Sweep(hidden, head, index, settings.chunk_bytes, gradient.kept)
    segments = Segments(
        hidden,
        sweep,
        gradient.needed,
        settings.segment_bytes,
        repeated=inputs.rows is not None,
        weight_dtype=inputs.weight.dtype,
        out=gradient.weight_grad,
    )
    for chunk, states, room in sweep:
        logits = room if chunk.stop <= sweep.kept else sweep.logits(states, room)
        out = segments.room(chunk, logits)
        kernels.bwd(logits, results.chunk(chunk), head, out)
        segments.add(chunk, out)
    return tuple(segments.gradients.results())


def _bwd_fake(*args: Any) -> tuple[torch.Tensor, ...]:
    gradient, inputs, _ = unpack(args, Gradient, Operands, Settings)
    by_hidden, by_weight, by_bias = gradient.needed
    needed = (by_hidden, by_weight and gradient.weight_grad is None, by_bias)
    return tuple(empty_gradients(inputs.hidden, inputs.weight, inputs.bias, needed))


register_fake(BWD, _bwd_fake)


class _LinearLogps(torch.autograd.Function):
    """Both operators; https://pytorch.org/docs/stable/notes/extending.html

    ``hidden``, ``weight`` and ``bias`` are arguments of their own, besides ``inputs``, so that autograd sees them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        inputs: Operands,
        settings: Settings,
        group: dist.ProcessGroup | None,
        accumulate: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # The leaf itself, because a saved tensor may be unpacked as another tensor (checkpointing, offloading).
        ctx.leaf = weight if accumulate else None
        inputs = inputs._replace(hidden=hidden, weight=weight, bias=bias)
        logp, entropy, stats, ctx.kept = torch.ops.vlmkernels.linear_logps_fwd(*inputs, *settings)
        if group is not None:
            inverse = Head(weight, bias, settings.temperature, settings.logit_scale, settings.softcap).inverse
            logp, entropy, stats = gathered(group, logp, entropy, stats, inverse)
            if inputs.mask is not None:
                logp, entropy = logp.masked_fill(~inputs.mask, 0), entropy.masked_fill(~inputs.mask, 0)
        ctx.settings, ctx.group = settings, group
        ctx.save_for_backward(*inputs, logp, entropy, stats)
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dlogp: torch.Tensor | None, dentropy: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        *inputs, logp, entropy, stats = ctx.saved_tensors
        dhidden = dweight = dbias = None
        if dlogp is not None or dentropy is not None:
            inputs = Operands(*inputs)
            kept, ctx.kept = ctx.kept, None  # it is overwritten: a second backward pass computes the logits again
            by_hidden, by_weight, by_bias, *_ = ctx.needs_input_grad
            weight_grad = None
            if ctx.leaf is not None and by_weight:
                ctx.leaf.grad = torch.zeros_like(ctx.leaf) if ctx.leaf.grad is None else ctx.leaf.grad
                weight_grad = ctx.leaf.grad
            gradient = Gradient(
                dlogp=torch.zeros_like(logp) if dlogp is None else dlogp,
                dentropy=dentropy,
                logp=logp,
                entropy=entropy,
                stats=stats,
                kept=inputs.hidden.new_empty((0, len(inputs.weight))) if kept is None else kept,
                weight_grad=weight_grad,
                needed=[by_hidden, by_weight, by_bias],
            )
            gradients = torch.ops.vlmkernels.linear_logps_bwd(*gradient, *inputs, *ctx.settings)
            needed = (by_hidden, by_weight and weight_grad is None, by_bias)
            dhidden, dweight, dbias = (g if n else None for g, n in zip(gradients, needed, strict=True))
            if ctx.group is not None and dhidden is not None:
                dist.all_reduce(dhidden, group=ctx.group)
        return dhidden, dweight, dbias, None, None, None, None


@overload
def linear_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = ...,
    temperature: float = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    mask: torch.Tensor | None = ...,
    rows: torch.Tensor | None = ...,
    return_entropy: Literal[False] = ...,
    chunk_bytes: int | None = ...,
    keep_logits_bytes: int | None = ...,
    accumulate_weight_grad: bool = ...,
    vocab_parallel: VocabParallel | None = ...,
    backend: str = ...,
) -> torch.Tensor: ...
@overload
def linear_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = ...,
    temperature: float = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    mask: torch.Tensor | None = ...,
    rows: torch.Tensor | None = ...,
    return_entropy: Literal[True],
    chunk_bytes: int | None = ...,
    keep_logits_bytes: int | None = ...,
    accumulate_weight_grad: bool = ...,
    vocab_parallel: VocabParallel | None = ...,
    backend: str = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def linear_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    return_entropy: bool = False,
    chunk_bytes: int | None = None,
    keep_logits_bytes: int | None = None,
    accumulate_weight_grad: bool = False,
    vocab_parallel: VocabParallel | None = None,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute the log-probability of ``targets`` under ``softmax(head(hidden) / temperature)``, and the softmax's entropy.

    Equivalent to::

        logits = (hidden.flatten(0, -2)[rows] @ weight.T + bias) * logit_scale
        logits = softcap * torch.tanh(logits / softcap)
        gather_logps(logits, targets, temperature=temperature, mask=mask, return_entropy=return_entropy)

    but it holds at most ``chunk_bytes`` of logits, and computes only the logits of selected rows. One GEMM computes the logits
    of a chunk, and one kernel reads them once. Logits are fp32 if the device's GEMM supports it; otherwise they have the dtype
    of ``hidden``, and the logit of each target is computed again in fp32. The backward pass overwrites the logits by their
    gradient, and runs one GEMM each for ``hidden`` and ``weight`` if they need gradients. It computes logits again that the
    forward pass did not keep.

    Args:
        hidden: (..., H), fp32, bf16 or fp16 (the reference also supports fp64). Autocast casts it like the input of a linear
            layer.
        weight: (V, H), the head, in the dtype of ``hidden``; or an fp32 master copy, which is cast for the GEMM and gets an
            fp32 gradient. A DTensor (FSDP2) over a mesh of one dimension is gathered, and its gradient averaged over the
            processes.
        targets: integers in [0, V), in the shape of the leading axes of ``hidden``, or of ``rows``. The result and the gradient
            of a target of -100 are 0, as in ``torch.nn.functional.cross_entropy``.
        bias: (V,) or None.
        temperature: divides the logits; > 0.
        logit_scale: multiplies the logits before the softcap (Cohere, Granite); > 0.
        softcap: limits the logits to (-softcap, softcap) by tanh (Gemma); > 0, or None for no limit.
        mask: bool, or 0 and 1 in any dtype, in the shape of ``targets``. Where it is false, nothing is computed, and the result
            and the gradient are 0. The number of selected results must be known on the host, so on a GPU each pass waits for
            the device once; ``rows`` avoids this.
        rows: integers, any shape: for each result, the index of its row in ``hidden.flatten(0, -2)``. An index may occur
            several times (the gradients are added in fp32): in a packed group the last prompt token predicts the first token of
            every completion.
        return_entropy: also return the entropy in nats. It is differentiable.
        chunk_bytes: upper bound on the memory of a chunk of logits. Default: 2**28; on a GPU 2**30, and there the backward pass
            also holds the 16-bit gradients of several chunks, up to 2**32 bytes, to accumulate them in fewer GEMMs. 0: one
            Triton kernel computes the results without logits. It has no gradients, and is the default where it was measured to
            be faster.
        keep_logits_bytes: upper bound on the memory of logits that are kept for the backward pass, besides the chunk. Default:
            keep the logits of the whole call if they fit in ``chunk_bytes`` (then there is no other chunk), otherwise none.
        accumulate_weight_grad: add the gradient of ``weight`` to ``weight.grad`` chunk by chunk, in its dtype, which saves a
            second (V, H) tensor. Autograd and hooks of ``weight`` then see no gradient. ``weight`` must be a leaf, and the call
            not compiled.
        vocab_parallel: ``weight`` and ``bias`` are this process's part of the vocabulary, see ``VocabParallel``; all other
            arguments are the same on all processes of the group. The forward pass runs one all-gather of four floats per token,
            the backward pass one all-reduce of the gradient of ``hidden``.
        backend: the backend of the kernels that read the logits, see ``vlmkernels.backend``.

    Returns:
        ``logps`` in the shape of ``targets``, fp32 (fp64 for fp64 hidden states); with ``return_entropy``, the pair
        ``(logps, entropy)``. ``hidden``, ``weight`` and ``bias`` get gradients if they require them.

    Raises:
        ValueError, TypeError: a shape, dtype, device or setting is wrong, or (on the CPU) an index is out of range. On a GPU
            this check would wait for the device: the result of a target out of range is NaN instead.
        NotImplementedError: the named backend does not support these tensors, or the placements of a DTensor are not supported.

    Source: the log-probability in equation 3 of Shao et al., DeepSeekMath (https://arxiv.org/abs/2402.03300); not holding all
    logits: Wijmans et al. (https://arxiv.org/abs/2411.09009).
    """
    given, backend = weight, resolve("linear_logps", backend)
    hidden, weight, bias = operands(hidden, weight, bias)
    if accumulate_weight_grad and not (weight is given and weight.is_leaf):
        raise ValueError("accumulate_weight_grad must be False unless weight is a leaf that this process holds whole, got True")
    check_parallel(weight, vocab_parallel)
    targets, mask = as_indices("targets", targets, device=hidden.device), as_mask("mask", mask, hidden.device)
    rows = None if rows is None else as_indices("rows", rows, device=hidden.device)
    ignored, counted = None, without_ignored(targets, mask)
    if mask is None and counted is not None and not is_readable(targets):
        # A mask would make the host wait for the device. The results of ignored targets are computed and then replaced.
        ignored = ~counted
        targets = targets.masked_fill(ignored, 0)
    else:
        mask = counted
    inputs = Operands(hidden, weight, bias, targets, mask, rows)
    check(inputs, temperature, logit_scale, softcap)
    segment_bytes = 0 if chunk_bytes is not None else default_dlogits_bytes(hidden.device) or 0
    chunk_bytes, keep_logits_bytes = budget(inputs, chunk_bytes, keep_logits_bytes, backend)
    settings = Settings(
        temperature=float(temperature),
        logit_scale=float(logit_scale),
        softcap=None if softcap is None else float(softcap),
        vocab_start=0 if vocab_parallel is None else vocab_parallel.start,
        vocab_size=len(weight) if vocab_parallel is None else vocab_parallel.size,
        chunk_bytes=chunk_bytes,
        keep_logits_bytes=keep_logits_bytes,
        segment_bytes=segment_bytes,
        backend=backend,
    )
    group = None if vocab_parallel is None else vocab_parallel.group
    logps, entropy = _LinearLogps.apply(hidden, weight, bias, inputs, settings, group, accumulate_weight_grad)
    if ignored is not None:
        logps, entropy = logps.masked_fill(ignored, 0), entropy.masked_fill(ignored, 0)
    return (logps, entropy) if return_entropy else logps
