"""Log-probability of chosen tokens from hidden states and the language-model head. Torch only: backends load on first use."""

import torch
from torch.library import define, impl, register_fake

from vlmkernels.backend import resolve, select
from vlmkernels.ops.checks import require, require_indices, require_nowhere
from vlmkernels.ops.linear_logps.check import budget, check, check_parallel, operands
from vlmkernels.ops.linear_logps.parallel import VocabParallel, gathered
from vlmkernels.ops.linear_logps.sweep import (
    Head,
    Segments,
    Sweep,
    asked_for,
    default_dlogits_bytes,
    flat,
    local_targets,
    result_dtype,
    row_bytes,
    select_results,
)  # fmt: skip

__all__ = ["VocabParallel", "linear_logps"]

FWD = "vlmkernels::linear_logps_fwd"
BWD = "vlmkernels::linear_logps_bwd"

_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? mask, Tensor? rows, float temperature,"
    " float logit_scale, float? softcap, int vocab_start, int vocab_size, int chunk_bytes, int keep_logits_bytes,"
    " int segment_bytes, str backend"
)
define(FWD, f"({_INPUTS}) -> (Tensor logp, Tensor entropy, Tensor stats, Tensor kept)")
# Of the results, those that are not needed are (0,). The gradient by the weight is added to weight_grad where that is given.
define(
    BWD,
    "(Tensor dlogp, Tensor? dentropy, Tensor logp, Tensor entropy, Tensor stats, Tensor(a!) kept, Tensor(b!)? weight_grad,"
    f" bool[] needed, {_INPUTS}) -> (Tensor dhidden, Tensor dweight, Tensor dbias)",
)


def _outputs(hidden, weight, targets, keep_logits_bytes):
    """logp, entropy; stats (..., 2), see reference.py; the logits of the first results, kept for the backward pass."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logp = torch.zeros(targets.shape, dtype=wide, device=hidden.device)
    most = keep_logits_bytes // max(row_bytes(hidden, len(weight)), 1)
    kept = torch.empty((min(targets.numel(), most), len(weight)), dtype=result_dtype(hidden), device=hidden.device)
    return logp, torch.zeros_like(logp), logp.new_zeros((*targets.shape, 2)), kept


@impl(FWD, "default")
@torch.no_grad()
def _fwd(
    hidden, weight, bias, targets, mask, rows, temperature, logit_scale, softcap, start, size, chunk_bytes, keep, segment_bytes,
    backend,
):  # fmt: skip
    require_indices("targets", targets, size, "the vocabulary", mask)
    if rows is not None:
        require_indices("rows", rows, hidden.shape[:-1].numel(), f"the rows of hidden {tuple(hidden.shape[:-1])}", mask)
    outputs = _outputs(hidden, weight, targets, keep)
    head = Head.of(hidden, weight, bias, temperature, logit_scale, softcap)
    asked, index = asked_for(mask, rows)
    (tokens,) = select_results(asked, local_targets(targets, start, len(weight), size))
    logp, entropy, stats = (out.new_empty(len(tokens), *out.shape[targets.dim() :]) for out in outputs[:3])
    if chunk_bytes == 0:
        select("linear_logps_fused", backend, hidden).fwd(flat(hidden), index, tokens, head, logp, entropy, stats)
    else:
        kernels = select("linear_logps", backend, hidden)
        sweep = Sweep(hidden, head, index, chunk_bytes, outputs[3])
        for chunk, states, room in sweep:
            logits = sweep.logits(states, room)
            kernels.fwd(logits, states, tokens[chunk], head, logp[chunk], entropy[chunk], stats[chunk])
    if hidden.device.type == "cpu" and hidden.dtype == torch.float16:  # other logits have the range of fp32
        require_nowhere(stats[:, 0].isposinf(), "hidden", "have logits within fp16's range, up to 65504", stats[:, 0])
    for out, result in zip(outputs, (logp, entropy, stats), strict=False):
        out = out.view(targets.numel(), *result.shape[1:])
        out.copy_(result) if asked is None else out.index_copy_(0, asked, result)
    return outputs


@register_fake(FWD)
def _fwd_fake(hidden, weight, bias, targets, *args):
    return _outputs(hidden, weight, targets, args[-3])


@impl(BWD, "default")
@torch.no_grad()
def _bwd(
    dlogp, dentropy, logp, entropy, stats, kept, weight_grad, needed,
    hidden, weight, bias, targets, mask, rows, temperature, logit_scale, softcap, start, size, chunk_bytes, keep, segment_bytes,
    backend,
):  # fmt: skip
    head = Head.of(hidden, weight, bias, temperature, logit_scale, softcap)
    asked, index = asked_for(mask, rows)
    sweep = Sweep(hidden, head, index, chunk_bytes, kept)
    kernels = select("linear_logps", backend, hidden)
    tokens, dlogp, dentropy, logp, entropy = select_results(
        asked, local_targets(targets, start, len(weight), size), dlogp, dentropy, logp, entropy
    )
    stats = stats.reshape(-1, 2) if asked is None else stats.reshape(-1, 2)[asked]
    options = {"repeated": rows is not None, "weight_dtype": weight.dtype, "out": weight_grad}
    segments = Segments(hidden, sweep, needed, segment_bytes, **options)
    for chunk, states, room in sweep:
        logits = room if chunk.stop <= sweep.kept else sweep.logits(states, room)
        out = segments.room(chunk, logits)
        cut = [None if x is None else x[chunk] for x in (tokens, dlogp, dentropy, logp, entropy, stats)]
        kernels.bwd(logits, *cut, head, out)
        segments.add(chunk, out)
    return tuple(segments.gradients.results())


@register_fake(BWD)
def _bwd_fake(dlogp, dentropy, logp, entropy, stats, kept, weight_grad, needed, hidden, weight, bias, *args):
    needed = (needed[0], needed[1] and weight_grad is None, needed[2])
    like = (hidden, weight, weight if bias is None else weight.new_empty(bias.shape))
    fresh = lambda x: torch.empty_like(x, memory_format=torch.contiguous_format)  # noqa: E731
    return tuple(fresh(x) if n else hidden.new_empty(0) for x, n in zip(like, needed, strict=True))


class _LinearLogps(torch.autograd.Function):
    """Both ops; https://pytorch.org/docs/stable/notes/extending.html"""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, mask, rows, *settings):
        *inputs, ctx.group, accumulate = settings
        # The leaf itself: what is saved for the backward pass may be unpacked as another tensor (checkpointing, offloading).
        ctx.leaf = weight if accumulate else None
        logp, entropy, stats, ctx.kept = torch.ops.vlmkernels.linear_logps_fwd(
            hidden, weight, bias, targets, mask, rows, *inputs
        )
        if ctx.group is not None:
            inverse = Head(weight, bias, *inputs[:3]).inverse
            logp, entropy, stats = gathered(ctx.group, logp, entropy, stats, inverse)
            if mask is not None:
                logp, entropy = logp.masked_fill(~mask, 0), entropy.masked_fill(~mask, 0)
        ctx.inputs = inputs
        ctx.save_for_backward(hidden, weight, bias, targets, mask, rows, logp, entropy, stats)
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlogp, dentropy):
        hidden, weight, bias, targets, mask, rows, logp, entropy, stats = ctx.saved_tensors
        nothing = (None,) * (len(ctx.inputs) + 5)
        if dlogp is None and dentropy is None:
            return (None, None, None, *nothing)
        kept, ctx.kept = ctx.kept, None  # the gradient is written over it: a second backward pass computes it anew
        kept = hidden.new_empty((0, len(weight))) if kept is None else kept
        weight_grad = None
        if ctx.leaf is not None and ctx.needs_input_grad[1]:
            ctx.leaf.grad = torch.zeros_like(ctx.leaf) if ctx.leaf.grad is None else ctx.leaf.grad
            weight_grad = ctx.leaf.grad
        gradients = torch.ops.vlmkernels.linear_logps_bwd(
            torch.zeros_like(logp) if dlogp is None else dlogp,
            dentropy,
            logp,
            entropy,
            stats,
            kept,
            weight_grad,
            list(ctx.needs_input_grad[:3]),
            hidden,
            weight,
            bias,
            targets,
            mask,
            rows,
            *ctx.inputs,
        )
        needed = [*ctx.needs_input_grad[:3]]
        needed[1] = needed[1] and weight_grad is None
        dhidden, dweight, dbias = (g if n else None for g, n in zip(gradients, needed, strict=True))
        if ctx.group is not None and dhidden is not None:
            torch.distributed.all_reduce(dhidden, group=ctx.group)
        return (dhidden, dweight, dbias, *nothing)


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
    """Log-probability of ``targets`` under ``softmax(head(hidden) / temperature)``, and that softmax's entropy.

    Equivalent to::

        logits = (hidden.flatten(0, -2)[rows] @ weight.T + bias) * logit_scale
        logits = softcap * torch.tanh(logits / softcap)
        gather_logps(logits, targets, temperature=temperature, mask=mask, return_entropy=return_entropy)

    without ever holding logits beyond ``chunk_bytes``, and without multiplying a row that is not asked for. Logits of a chunk
    are made by one GEMM, in fp32 where the device's library can (else in the dtype of ``hidden``, and the target's anew in
    fp32), read once by one kernel, and in the backward pass overwritten by their gradient: a GEMM each for ``hidden`` and
    ``weight``, and none for what needs no gradient. Those that were not kept from the forward pass are computed again.

    Args:
        hidden: (..., H), fp32, bf16 or fp16 (fp64 in the reference). Under autocast it is cast as a linear layer's input is.
        weight: (V, H), the head, in the dtype of ``hidden``; or in fp32: a master copy, cast for the GEMM, whose gradient is
            fp32. A DTensor (FSDP2) of one mesh dimension is gathered, and its gradient averaged over the processes.
        targets: (...) like the leading axes of ``hidden``, or like ``rows``; int64 in [0, V).
        bias: (V,) or None.
        temperature: divides the logits; > 0.
        logit_scale: multiplies the logits before the cap (Cohere, Granite); > 0.
        softcap: caps the logits at ± this value by tanh (Gemma); > 0 or None.
        mask: bool, like ``targets``. Where false nothing is computed: the result is 0 and so is the gradient. (Their number
            must be known on the host: on a GPU this waits for the device once per pass; ``rows`` does not.)
        rows: int64: flat indices into the leading axes of ``hidden``, one per result. Rows may repeat (their gradients add
            up, in fp32): in a packed group the last prompt token predicts the first token of every completion.
        return_entropy: also return the entropy, in nats, differentiable.
        chunk_bytes: upper bound on the memory of a chunk of logits. Default: 2**28; on a GPU 2**30, where the backward pass
            also holds the 16-bit gradients of several chunks, up to 2**32 bytes, to accumulate them in fewer GEMMs. 0, where no
            gradient is needed: no logits at all, in one Triton kernel; the default on GPUs where it was measured to be faster.
        keep_logits_bytes: the most that logits kept for the backward pass take, beside the chunk. Default: those of the whole
            call where they fit in ``chunk_bytes``, which then is all that the call takes; else none.
        accumulate_weight_grad: add the gradient by ``weight`` to ``weight.grad`` itself, chunk by chunk in its dtype, so that
            there is no second (V, H) tensor. Autograd, and any hook of ``weight``, then sees no gradient by it. ``weight`` is a
            leaf, and the call not compiled.
        vocab_parallel: ``weight`` and ``bias`` are this process's part of the vocabulary, see ``VocabParallel``; everything
            else is the same on all processes of the group. One all-gather of four floats per token forward, one all-reduce of
            the gradient by ``hidden`` backward.
        backend: of the kernel between the GEMMs, see ``vlmkernels.backend``.

    Returns:
        ``logps`` like ``targets``, fp32 (fp64 for fp64); with ``return_entropy`` the pair ``(logps, entropy)``.
        Gradients go to ``hidden``, ``weight`` and ``bias``, each only where it requires one.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or setting; on the CPU also an index out of range (on a GPU that
            check would wait for the device: such a target's logp is NaN there).
        NotImplementedError: the named backend does not serve these tensors, or the DTensor's placements.

    Source: the log-probability of Shao et al., DeepSeekMath (https://arxiv.org/abs/2402.03300), equation 3; never holding the
    logits: Wijmans et al. (https://arxiv.org/abs/2411.09009).
    """
    given, backend = weight, resolve(backend)
    hidden, weight, bias = operands(hidden, weight, bias)
    accumulates = not accumulate_weight_grad or (weight is given and weight.is_leaf)
    require(accumulates, "accumulate_weight_grad", "be False unless weight is a leaf that this process holds whole", True)
    check_parallel(weight, vocab_parallel)
    check(hidden, weight, bias, targets, mask, rows, temperature, logit_scale, softcap)
    segment_bytes = 0 if chunk_bytes is not None else default_dlogits_bytes(hidden.device) or 0
    chunk_bytes, keep_logits_bytes = budget(hidden, weight, bias, targets.numel(), chunk_bytes, keep_logits_bytes, backend)
    group, start, size = (None, 0, len(weight)) if vocab_parallel is None else vocab_parallel
    softcap = None if softcap is None else float(softcap)
    logps, entropy = _LinearLogps.apply(
        hidden, weight, bias, targets, mask, rows,
        float(temperature), float(logit_scale), softcap, start, size, chunk_bytes, keep_logits_bytes, segment_bytes,
        backend, group, accumulate_weight_grad,
    )  # fmt: skip
    return (logps, entropy) if return_entropy else logps
