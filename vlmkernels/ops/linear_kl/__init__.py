"""Divergence between the distributions of two heads. Imports only torch: triton and ``_C`` load on first use."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.library import define, impl, register_fake

from vlmkernels.backend import resolve, select
from vlmkernels.ops.arguments import as_indices, as_mask, as_tensor
from vlmkernels.ops.dispatch import schema, unpack
from vlmkernels.ops.linear_kl.check import check, check_beta, check_rows, chunk_size, support_size
from vlmkernels.ops.linear_kl.inputs import Gradient, Operands, Outputs, Pair, SelectedRows, Settings
from vlmkernels.ops.linear_kl.top_k import TopK
from vlmkernels.ops.linear_logps.check import check_logits, operands
from vlmkernels.ops.linear_logps.sweep import (
    Head,
    Segments,
    Sweep,
    default_dlogits_bytes,
    empty_gradients,
    gradient_scale,
    is_scaled,
    result_dtype,
    row_bytes,
    select_results,
    selected_indices,
    write_results,
)

__all__ = ["linear_kl"]

FWD = "vlmkernels::linear_kl_fwd"
BWD = "vlmkernels::linear_kl_bwd"
SUM = "vlmkernels::linear_kl_sum"
STATS = 5


class Weights(NamedTuple):
    """The arguments of the operator of a weighted sum, after ``Operands`` and before ``Settings``."""

    token_weights: torch.Tensor
    needed: list[bool]  # whether hidden, weight and bias need gradients


class Sum(NamedTuple):
    """The results of the operator of a weighted sum. Gradients that are not needed have shape (0,)."""

    total: torch.Tensor
    scale: torch.Tensor  # (): with is_scaled, multiplies the gradients; otherwise (0,)
    dhidden: torch.Tensor
    dweight: torch.Tensor
    dbias: torch.Tensor


define(FWD, f"({schema(Operands, Settings)}) -> ({schema(Outputs)})")
define(BWD, f"({schema(Gradient, Operands, Settings, mutates=('kept',))}) -> (Tensor dhidden, Tensor dweight, Tensor dbias)")
define(SUM, f"({schema(Operands, Weights, Settings)}) -> ({schema(Sum)})")


def _shape(inputs: Operands) -> torch.Size:
    return inputs.hidden.shape[:-1] if inputs.rows is None else inputs.rows.shape


def _wide(inputs: Operands) -> torch.dtype:
    """The dtype of computation."""
    return torch.promote_types(torch.promote_types(inputs.hidden.dtype, inputs.teacher_hidden.dtype), torch.float32)


def _outputs(inputs: Operands, settings: Settings) -> Outputs:
    shape, device, dtype, vocab = _shape(inputs), inputs.hidden.device, _wide(inputs), len(inputs.weight)
    divergence = torch.zeros(shape, dtype=dtype, device=device)
    k = settings.top_k
    num = shape.numel() if settings.keep_logits else 0
    return Outputs(
        divergence=divergence,
        stats=divergence.new_zeros((*shape, STATS)),
        support=torch.zeros((*shape, k), dtype=torch.int64, device=device),
        teacher_logps=divergence.new_zeros((*shape, k + 1 if k else 0)),
        kept=torch.empty((num, vocab), dtype=result_dtype(inputs.hidden), device=device),
        # With top_k, the support and its log-probabilities are all that the backward pass needs of the teacher.
        teacher_kept=torch.empty((0 if k else num, vocab), dtype=result_dtype(inputs.teacher_hidden), device=device),
    )


def _pair(inputs: Operands, settings: Settings) -> Pair:
    student = Head.from_operands(
        inputs.hidden, inputs.weight, inputs.bias, settings.temperature, settings.logit_scale, settings.softcap
    )
    teacher = Head.from_operands(
        inputs.teacher_hidden,
        inputs.teacher_weight,
        inputs.teacher_bias,
        settings.temperature,
        settings.teacher_logit_scale,
        settings.teacher_softcap,
    )
    return Pair(student, teacher, settings.beta)


def _kernels(inputs: Operands, settings: Settings) -> Any:
    """The functions ``fwd``, ``bwd`` and ``sweep`` of a chunk, see reference.py."""
    if not settings.top_k:
        return select("linear_kl", settings.backend, inputs.hidden, inputs.teacher_hidden)
    student, teacher = (select("linear_logps", settings.backend, x) for x in (inputs.hidden, inputs.teacher_hidden))
    return TopK(student, teacher)


class Chunk(NamedTuple):
    """The same rows of both sides: their slice of the selected rows, hidden states and memory for the logits."""

    rows: slice
    states: torch.Tensor
    room: torch.Tensor
    teacher_states: torch.Tensor | None  # None: the teacher's logits are not needed
    teacher_room: torch.Tensor | None


class Sweeps:
    """Iterate over the selected rows of student and teacher in the same chunks."""

    def __init__(
        self,
        inputs: Operands,
        pair: Pair,
        settings: Settings,
        kept: torch.Tensor | None = None,
        teacher_kept: torch.Tensor | None = None,
    ) -> None:
        self.selected, index = selected_indices(inputs.mask, inputs.rows)
        _, teacher_index = selected_indices(inputs.mask, inputs.teacher_rows)
        self.student = Sweep(inputs.hidden, pair.student, index, settings.chunk_bytes, kept)
        # With top_k the teacher's logits are not kept, but their chunks are those of the student.
        rows_of_chunk = self.student.kept or self.student.rows_of_chunk
        self.teacher = Sweep(
            inputs.teacher_hidden,
            pair.teacher,
            teacher_index,
            settings.chunk_bytes,
            None if settings.top_k else teacher_kept,
            rows_of_chunk=rows_of_chunk,
        )

    def __iter__(self) -> Iterator[Chunk]:
        for (rows, states, room), (_, *teacher) in zip(self.student, self.teacher, strict=True):
            yield Chunk(rows, states, room, *teacher)

    def of_student(self) -> Iterator[Chunk]:
        """Iterate over the rows of the student only."""
        for rows, states, room in self.student:
            yield Chunk(rows, states, room, None, None)

    def logits(self, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute the logits of the sides in the chunk."""
        teacher_logits = None
        if chunk.teacher_states is not None and chunk.teacher_room is not None:
            teacher_logits = self.teacher.logits(chunk.teacher_states, chunk.teacher_room)
        return self.student.logits(chunk.states, chunk.room), teacher_logits

    def results(self, outputs: Outputs, upstream: torch.Tensor | None = None) -> SelectedRows:
        """Return memory for the results of the selected rows."""
        num, dims = self.student.num, outputs.divergence.dim()
        parts = [x.new_empty((num, *x.shape[dims:])) for x in outputs[:4]]
        return SelectedRows._make([*parts, upstream])

    def check(self, inputs: Operands, results: SelectedRows) -> None:
        """Check that no logit of fp16 overflowed."""
        check_logits(inputs.hidden, results.stats[:, :1], "hidden")
        check_logits(inputs.teacher_hidden, results.stats[:, 2:3], "teacher_hidden")


def _segments(inputs: Operands, settings: Settings, sweep: Sweep, needed: list[bool], **options: Any) -> Segments:
    return Segments(
        inputs.hidden,
        sweep,
        needed,
        settings.segment_bytes,
        repeated=inputs.rows is not None,
        weight_dtype=inputs.weight.dtype,
        **options,
    )


@impl(FWD, "default")
@torch.no_grad()
def _fwd(*args: Any) -> Outputs:
    inputs, settings = unpack(args, Operands, Settings)
    check_rows(inputs)
    outputs, pair, kernels = _outputs(inputs, settings), _pair(inputs, settings), _kernels(inputs, settings)
    sweeps = Sweeps(inputs, pair, settings, outputs.kept, outputs.teacher_kept)
    results = sweeps.results(outputs)
    for chunk in sweeps:
        kernels.fwd(*sweeps.logits(chunk), results.chunk(chunk.rows), pair)
    sweeps.check(inputs, results)
    for out, result in zip(outputs, results[:4], strict=False):
        if result.numel():
            write_results(sweeps.selected, out, result)
    return outputs


def _fwd_fake(*args: Any) -> Outputs:
    return _outputs(*unpack(args, Operands, Settings))


register_fake(FWD, _fwd_fake)


@impl(BWD, "default")
@torch.no_grad()
def _bwd(*args: Any) -> tuple[torch.Tensor, ...]:
    gradient, inputs, settings = unpack(args, Gradient, Operands, Settings)
    pair, kernels = _pair(inputs, settings), _kernels(inputs, settings)
    sweeps = Sweeps(inputs, pair, settings, gradient.kept, gradient.teacher_kept)
    selected, kept = sweeps.selected, sweeps.student.kept
    num, k = sweeps.student.num, settings.top_k
    results = SelectedRows(
        divergence=gradient.ddivergence.new_empty(num),
        stats=select_results(selected, gradient.stats, STATS),
        support=select_results(selected, gradient.support, k) if k else gradient.support.new_empty(num, 0),
        teacher_logps=select_results(selected, gradient.teacher_logps, k + 1) if k else gradient.stats.new_empty(num, 0),
        upstream=select_results(selected, gradient.ddivergence),
    )
    segments = _segments(inputs, settings, sweeps.student, gradient.needed)
    for chunk in sweeps.of_student() if k else sweeps:
        logits, teacher_logits = (chunk.room, chunk.teacher_room) if chunk.rows.stop <= kept else sweeps.logits(chunk)
        out = segments.room(chunk.rows, logits)
        kernels.bwd(logits, teacher_logits, results.chunk(chunk.rows), pair, out)
        segments.add(chunk.rows, out)
    return tuple(segments.gradients.results())


def _bwd_fake(*args: Any) -> tuple[torch.Tensor, ...]:
    gradient, inputs, _ = unpack(args, Gradient, Operands, Settings)
    return tuple(empty_gradients(inputs.hidden, inputs.weight, inputs.bias, gradient.needed))


register_fake(BWD, _bwd_fake)


@impl(SUM, "default")
@torch.no_grad()
def _sum(*args: Any) -> Sum:
    inputs, weights, settings = unpack(args, Operands, Weights, Settings)
    check_rows(inputs)
    hidden = inputs.hidden
    outputs, pair, kernels = _outputs(inputs, settings), _pair(inputs, settings), _kernels(inputs, settings)
    sweeps = Sweeps(inputs, pair, settings)
    token_weights = select_results(sweeps.selected, weights.token_weights)
    scale, upstream = token_weights.new_empty(0), token_weights
    if is_scaled(hidden):
        number = gradient_scale(token_weights.abs().amax().item() if len(token_weights) else 0.0)
        scale, upstream = token_weights.new_full((), number), token_weights * number
    results = sweeps.results(outputs, upstream)
    segments = _segments(inputs, settings, sweeps.student, weights.needed, in_fp32=is_scaled(hidden))
    for chunk in sweeps:
        logits, teacher_logits = sweeps.logits(chunk)
        out = segments.room(chunk.rows, logits)
        kernels.sweep(logits, teacher_logits, results.chunk(chunk.rows), pair, out)
        segments.add(chunk.rows, out)
    sweeps.check(inputs, results)
    return Sum((token_weights * results.divergence).sum(), scale, *segments.gradients.results())


def _sum_fake(*args: Any) -> Sum:
    inputs, weights, _ = unpack(args, Operands, Weights, Settings)
    hidden, scaled = inputs.hidden, is_scaled(inputs.hidden)
    total = hidden.new_empty((), dtype=_wide(inputs))
    gradients = empty_gradients(hidden, inputs.weight, inputs.bias, weights.needed, scaled)
    return Sum(total, total.new_empty(() if scaled else 0), *gradients)


register_fake(SUM, _sum_fake)


class _LinearKL(torch.autograd.Function):
    """Divergences per token: both operators; https://pytorch.org/docs/stable/notes/extending.html

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
    ) -> torch.Tensor:
        inputs = inputs._replace(hidden=hidden, weight=weight, bias=bias)
        outputs = Outputs(*torch.ops.vlmkernels.linear_kl_fwd(*inputs, *settings))
        ctx.settings, ctx.kept = settings, (outputs.kept, outputs.teacher_kept)
        ctx.save_for_backward(*inputs, outputs.stats, outputs.support, outputs.teacher_logps)
        return outputs.divergence

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, ddivergence: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *inputs, stats, support, teacher_logps = ctx.saved_tensors
        inputs = Operands(*inputs)
        kept, ctx.kept = ctx.kept, None  # it is overwritten: a second backward pass computes the logits again
        if kept is None:
            none = (0, len(inputs.weight))
            kept = [x.new_empty(none, dtype=result_dtype(x)) for x in (inputs.hidden, inputs.teacher_hidden)]
        needed = list(ctx.needs_input_grad[:3])
        gradient = Gradient(ddivergence, stats, support, teacher_logps, kept[0], kept[1], needed)
        gradients = torch.ops.vlmkernels.linear_kl_bwd(*gradient, *inputs, *ctx.settings)
        dhidden, dweight, dbias = (g if n else None for g, n in zip(gradients, needed, strict=True))
        return dhidden, dweight, dbias, None, None


class _LinearKLSum(torch.autograd.Function):
    """The weighted sum: its operator computes the gradients, which the backward pass multiplies by the upstream gradient.

    The gradients are not saved tensors, because hooks of saved tensors (offloading) would copy gigabytes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        inputs: Operands,
        weights: Weights,
        settings: Settings,
    ) -> torch.Tensor:
        inputs = inputs._replace(hidden=hidden, weight=weight, bias=bias)
        outputs = Sum(*torch.ops.vlmkernels.linear_kl_sum(*inputs, *weights, *settings))
        ctx.needed, ctx.dtypes = weights.needed, (hidden.dtype, weight.dtype, weight.dtype)
        ctx.scale = outputs.scale if is_scaled(hidden) else None
        ctx.gradients = [outputs.dhidden, outputs.dweight, outputs.dbias]
        return outputs.total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dtotal: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "linear_kl with token_weights supports one backward pass, which overwrites what the forward pass kept;"
                " for several passes multiply the divergences of linear_kl by the weights"
            )
        dtotal = dtotal if ctx.scale is None else dtotal / ctx.scale
        # On the CPU reading the factor costs nothing, and it usually saves a pass over the gradients.
        if torch.compiler.is_compiling() or dtotal.device.type != "cpu" or dtotal.item() != 1:
            gradients = [x.mul_(dtotal) for x in gradients]
        results = zip(gradients, ctx.dtypes, ctx.needed, strict=True)
        dhidden, dweight, dbias = (x.to(dtype) if n else None for x, dtype, n in results)
        return dhidden, dweight, dbias, None, None, None


def linear_kl(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    top_k: int | None = None,
    mask: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    teacher_rows: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Compute the divergence between the next-token distributions of a student and a teacher, from their hidden states.

    Equivalent to::

        log_p = log_softmax(softcapped(hidden.flatten(0, -2)[rows] @ weight.T + bias) / temperature)
        log_q = log_softmax(softcapped(teacher_hidden.flatten(0, -2)[teacher_rows] @ teacher_weight.T + ...) / temperature)
        if beta == 0:  # forward KL(teacher || student)
            divergence = kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
        elif beta == 1:  # reverse KL(student || teacher)
            divergence = kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
        else:  # generalized Jensen-Shannon divergence, with M = beta teacher + (1 - beta) student
            log_m = logaddexp(log_q + log(beta), log_p + log(1 - beta))
            divergence = beta * KL(teacher || M) + (1 - beta) * KL(student || M)

    but it holds only a chunk of logits of each side. ``beta`` means the same as in TRL's ``DistillationConfig`` and in Liger's
    ``LigerFusedLinearJSDLoss``. Between 0 and 1 the divergence is finite, at most -beta log(beta) - (1 - beta) log(1 - beta).
    It tends to 0 as beta tends to 0 or 1, where divergence / beta tends to the forward and divergence / (1 - beta) to the
    reverse KL; the values for beta = 0 and 1 are these limits.

    Without ``token_weights``, the backward pass overwrites the student's logits by their gradient and runs one GEMM each for
    ``hidden`` and ``weight`` if they need gradients. If the student's logits do not fit in ``chunk_bytes``, it computes those
    of both sides again. With ``token_weights``, the forward pass computes the gradients chunk by chunk, and no logits twice.

    A term x log(x / y) is 0 where x = 0, so logits of -inf (tokens that a side excludes) are fine. A KL divergence is inf where
    its first distribution has a token that its second excludes; the gradient of the forward KL is finite there, that of the
    reverse KL is NaN.

    Args:
        hidden, weight, bias: the student's hidden states (..., H), head (V, H) and bias (V,) or None; dtypes as in
            ``linear_logps``: the weight may be an fp32 master copy, or a DTensor.
        teacher_hidden, teacher_weight, teacher_bias: those of the teacher, (..., H'), (V, H') and (V,). Width and dtype may
            differ from the student's. They get no gradient.
        beta: selects the divergence: 0, 1, or between them in [1e-6, 1 - 1e-6].
        temperature: divides the logits of both sides; > 0.
        logit_scale, softcap, teacher_logit_scale, teacher_softcap: see ``linear_logps``.
        top_k: compare the distributions of k + 1 events: the teacher's k most probable tokens, each for itself, and all other
            tokens together, whose probability is the sum of theirs (the "tail" of TRL's sparse losses). Nothing is normalized
            again. The result is at most that of the whole vocabulary, and equal to it for k >= V - 1. Which of several tokens
            with equal logits are among the k is not defined. The backward pass does not need the teacher's logits.
        mask: bool, or 0 and 1, in the shape of the results. Where it is false, nothing is computed, and the result and the
            gradient are 0. On a GPU each pass waits for the device once; ``rows`` avoids this.
        rows, teacher_rows: integers, both of any one shape, which is that of the results: for each result, the index of its row
            in ``hidden.flatten(0, -2)`` and ``teacher_hidden.flatten(0, -2)``. Default: the leading axes. An index may occur
            several times (the gradients are added in fp32).
        token_weights: numbers in the shape of the results, constants: return the sum of token_weights * divergence instead.
            Only one backward pass is possible.
        chunk_bytes: upper bound on the memory of a chunk of the student's logits; the chunk of the teacher's logits has as many
            rows. Default: 2**28; on a GPU 2**30, and there up to 2**32 bytes of 16-bit logit gradients are held besides.
        backend: the backend of the kernels that read the logits, see ``vlmkernels.backend``.

    Returns:
        The divergences in nats, fp32 (fp64 if a side is fp64), in the shape of ``rows``, or else of the leading axes of
        ``hidden``; with ``token_weights`` their weighted sum, (). ``hidden``, ``weight`` and ``bias`` get gradients if they
        require them.

    Raises:
        ValueError, TypeError: a shape, dtype, device or setting is wrong, the vocabularies differ, or (on the CPU) an index is
            out of range.
        NotImplementedError: the named backend does not support these tensors, or the placements of a DTensor are not supported.
        RuntimeError: a second backward pass with ``token_weights``.

    Source: Agarwal et al., On-Policy Distillation of Language Models (https://arxiv.org/abs/2306.13649), equation 1 and
    section 2; gradients in the forward pass: Hsu et al. (https://arxiv.org/abs/2410.10989).
    """
    backend = resolve("linear_kl", backend)
    hidden, weight, bias = operands(hidden, weight, bias)
    with torch.no_grad():
        teacher_hidden, teacher_weight, teacher_bias = operands(teacher_hidden, teacher_weight, teacher_bias, "teacher_")
    device = hidden.device
    rows, teacher_rows = (
        x if x is None else as_indices(name, x, device=device) for name, x in (("rows", rows), ("teacher_rows", teacher_rows))
    )
    inputs = Operands(
        hidden,
        weight,
        bias,
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        as_mask("mask", mask, device),
        rows,
        teacher_rows,
    )
    check_beta(beta)
    if token_weights is not None:
        token_weights = as_tensor("token_weights", token_weights, device)
    check(inputs, temperature, (logit_scale, teacher_logit_scale), (softcap, teacher_softcap), token_weights)
    needed = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    segment_bytes = 0 if chunk_bytes is not None else default_dlogits_bytes(device) or 0
    chunk_bytes = chunk_size(inputs, chunk_bytes)
    fits = _shape(inputs).numel() * row_bytes(hidden, len(weight)) <= chunk_bytes
    settings = Settings(
        beta=float(beta),
        temperature=float(temperature),
        logit_scale=float(logit_scale),
        softcap=None if softcap is None else float(softcap),
        teacher_logit_scale=float(teacher_logit_scale),
        teacher_softcap=None if teacher_softcap is None else float(teacher_softcap),
        top_k=support_size(top_k, len(weight)),
        chunk_bytes=chunk_bytes,
        keep_logits=token_weights is None and any(needed) and fits,
        segment_bytes=segment_bytes,
        backend=backend,
    )
    if token_weights is None:
        return _LinearKL.apply(hidden, weight, bias, inputs, settings)  # type: ignore[no-any-return]
    if not any(needed):
        divergence: torch.Tensor = _LinearKL.apply(hidden, weight, bias, inputs, settings)
        return (divergence * token_weights.to(divergence.dtype)).sum()
    weights = Weights(token_weights.to(_wide(inputs)), needed)
    return _LinearKLSum.apply(hidden, weight, bias, inputs, weights, settings)  # type: ignore[no-any-return]
