"""Log-probabilities of given tokens from logits. Imports only torch: triton and ``_C`` load on first use."""

from typing import Any, Literal, overload

import torch
from torch.library import define, impl, register_autograd, register_fake

from vlmkernels.backend import resolve, select
from vlmkernels.ops.arguments import as_indices, as_mask, without_ignored
from vlmkernels.ops.checks import require_factor, require_indices, require_targets, require_tensor
from vlmkernels.ops.dispatch import schema
from vlmkernels.ops.gather_logps.inputs import Gradient, Inputs, Outputs, Results

__all__ = ["gather_logps"]

FWD = "vlmkernels::gather_logps_fwd"
BWD = "vlmkernels::gather_logps_bwd"
BWD_INPLACE = "vlmkernels::gather_logps_bwd_"

define(FWD, f"({schema(Inputs)}) -> ({schema(Outputs)})")
define(BWD, f"(Tensor logits, {schema(Gradient)}) -> Tensor")
define(BWD_INPLACE, f"(Tensor(a!) logits, {schema(Gradient)}) -> ()")


def _outputs(inputs: Inputs) -> Outputs:
    logits, targets = inputs.logits, inputs.targets
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logp = torch.empty(targets.shape, dtype=dtype, device=logits.device)
    entropy = logp.new_empty(targets.shape if inputs.return_entropy else 0)
    return Outputs(logp, entropy, logp.new_empty((*targets.shape, 2)))


@impl(FWD, "default")
def _fwd(*args: Any) -> Outputs:
    inputs = Inputs(*args)
    logits, targets, mask, rows = inputs.logits, inputs.targets, inputs.mask, inputs.rows
    require_indices("targets", targets, logits.shape[-1], "the vocabulary of logits", mask)
    if rows is not None:
        leading = logits.shape[:-1]
        require_indices("rows", rows, leading.numel(), f"the rows of logits {tuple(leading)}", mask)
    outputs = _outputs(inputs)
    if targets.numel():
        select("gather_logps", inputs.backend, logits).fwd(logits, targets, mask, rows, inputs.temperature, outputs)
    return outputs


def _fwd_fake(*args: Any) -> Outputs:
    return _outputs(Inputs(*args))


register_fake(FWD, _fwd_fake)


def _kernel_inputs(gradient: Gradient, num_rows: int) -> Results:
    """Return the inputs of the backward kernels: with ``rows``, sorted by row, with masked results at the end."""
    num = gradient.targets.numel()
    dlogp, dentropy, entropy, mask = gradient.dlogp, gradient.dentropy, gradient.entropy, gradient.mask
    results = Results(
        dlogp=gradient.stats.new_zeros(num) if dlogp is None else dlogp.reshape(num),
        targets=gradient.targets.reshape(num),
        stats=gradient.stats.reshape(num, 2),
        dentropy=None if dentropy is None else dentropy.reshape(num),
        entropy=None if dentropy is None else entropy.reshape(num),
        mask=None if mask is None else mask.reshape(num),
        offsets=None,
    )
    if gradient.rows is None:
        return results
    rows = gradient.rows.reshape(num)
    keys = rows if results.mask is None else rows.masked_fill(~results.mask, num_rows)
    keys, order = keys.sort()
    offsets = torch.searchsorted(keys, torch.arange(num_rows + 1, device=keys.device))
    ordered = (t if t is None else t[order] for t in results._replace(mask=None))
    return Results._make(ordered)._replace(offsets=offsets)


def _write_gradient(out: torch.Tensor, logits: torch.Tensor, gradient: Gradient) -> None:
    """Write the gradient of the logits to every element of ``out``, which may be ``logits`` itself."""
    if out.numel():
        results = _kernel_inputs(gradient, logits.shape[:-1].numel())
        select("gather_logps", gradient.backend, logits).bwd(logits, results, gradient.temperature, out)


@impl(BWD, "default")
def _bwd(logits: torch.Tensor, *gradient: Any) -> torch.Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _write_gradient(out, logits, Gradient(*gradient))
    return out


def _bwd_fake(logits: torch.Tensor, *gradient: Any) -> torch.Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


register_fake(BWD, _bwd_fake)


@impl(BWD_INPLACE, "default")
def _bwd_inplace(logits: torch.Tensor, *gradient: Any) -> None:
    _write_gradient(logits, logits, Gradient(*gradient))


def _bwd_inplace_fake(logits: torch.Tensor, *gradient: Any) -> None:
    pass


register_fake(BWD_INPLACE, _bwd_inplace_fake)


# The gradients of the arguments after logits.
NO_GRADIENTS = (None,) * (len(Inputs._fields) - 1)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    arguments, outputs = Inputs(*inputs), Outputs(*output)
    ctx.temperature, ctx.inplace, ctx.backend = arguments.temperature, arguments.inplace_backward, arguments.backend
    ctx.save_for_backward(arguments.logits, arguments.targets, arguments.mask, arguments.rows, outputs.entropy, outputs.stats)
    ctx.mark_non_differentiable(outputs.stats)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dlogp: torch.Tensor | None, dentropy: torch.Tensor | None, _: None) -> tuple[Any, ...]:
    logits, targets, mask, rows, entropy, stats = ctx.saved_tensors
    if dentropy is not None and dentropy.numel() == 0:
        dentropy = None
    dlogits = None
    if ctx.needs_input_grad[0] and not (dlogp is None and dentropy is None):
        gradient = Gradient(dlogp, dentropy, targets, entropy, stats, mask, rows, ctx.temperature, ctx.backend)
        if ctx.inplace:
            dlogits = logits.detach()
            torch.ops.vlmkernels.gather_logps_bwd_(dlogits, *gradient)
        else:
            dlogits = torch.ops.vlmkernels.gather_logps_bwd(logits, *gradient)
    return (dlogits, *NO_GRADIENTS)


register_autograd(FWD, _backward, setup_context=_save)


@overload
def gather_logps(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = ...,
    mask: torch.Tensor | None = ...,
    rows: torch.Tensor | None = ...,
    return_entropy: Literal[False] = ...,
    inplace_backward: bool = ...,
    backend: str = ...,
) -> torch.Tensor: ...
@overload
def gather_logps(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = ...,
    mask: torch.Tensor | None = ...,
    rows: torch.Tensor | None = ...,
    return_entropy: Literal[True],
    inplace_backward: bool = ...,
    backend: str = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def gather_logps(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    return_entropy: bool = False,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute the log-probability of ``targets`` under ``softmax(logits / temperature)``, and the entropy of this softmax.

    Equivalent to::

        logp_all = torch.log_softmax(logits.float() / temperature, dim=-1)
        logps = logp_all.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        entropy = -(logp_all.exp() * logp_all).sum(-1)

    but the only tensor of the size of ``logits`` is their gradient: the forward pass reads the logits once, and the backward
    pass reads them once and writes the gradient once. With ``rows``, ``logits`` above is ``logits.flatten(0, -2)[rows]``.

    Args:
        logits: (..., V), fp32, bf16 or fp16 (the reference also supports fp64). The last axis must be contiguous; the others
            may have any stride, so ``logits[:, :-1]`` is not copied.
        targets: integers in [0, V), in the shape of the leading axes of ``logits``, or of ``rows``. -100 is masked, as in
            ``torch.nn.functional.cross_entropy``.
        temperature: divides the logits; > 0.
        mask: bool, or 0 and 1 in any dtype, in the shape of ``targets``. Where it is false, the logits are not read, the target
            may have any value, and the results and the gradient are 0.
        rows: integers, any shape: for each result, the index of its row in ``logits.flatten(0, -2)``. Only these rows are read,
            for example those that predict completion tokens in a batch full of image and padding tokens. An index may occur
            several times (the gradients are added); rows without a result get gradient 0.
        return_entropy: also return the entropy in nats. It is differentiable.
        inplace_backward: write the gradient over ``logits`` in the backward pass, which saves a tensor of their size. The
            logits must not be used afterwards.
        backend: see ``vlmkernels.backend``.

    Returns:
        ``logps`` in the shape of ``targets``, fp32 (fp64 for fp64 logits); with ``return_entropy``, the pair
        ``(logps, entropy)``. Computed in fp32, also for 16-bit logits. ``logits`` get a gradient, in their dtype.

    Raises:
        ValueError, TypeError: a shape, dtype, device or temperature is wrong, or (on the CPU) a target or row is out of range.
            On a GPU, where this check would wait for the device, the result of an index out of range is NaN instead.
        NotImplementedError: the named backend does not support these tensors.

    Source: the log-probability in equation 3 of Shao et al., DeepSeekMath (https://arxiv.org/abs/2402.03300).
    """
    require_tensor("logits", logits)
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be (..., V) with V >= 1, got {tuple(logits.shape)}")
    require_factor("temperature", temperature)
    targets, mask = as_indices("targets", targets, device=logits.device), as_mask("mask", mask, logits.device)
    rows = None if rows is None else as_indices("rows", rows, device=logits.device)
    mask = without_ignored(targets, mask)
    require_targets("logits", logits, "logits without the vocabulary", targets, mask, rows)
    if inplace_backward and any(stride == 0 < size - 1 for size, stride in zip(logits.shape, logits.stride(), strict=True)):
        raise ValueError(
            f"inplace_backward must be false for logits that share memory (an axis of stride 0), got strides {logits.stride()}"
        )
    logps, entropy, _ = torch.ops.vlmkernels.gather_logps_fwd(
        logits, targets, mask, rows, float(temperature), return_entropy, inplace_backward, resolve("gather_logps", backend)
    )
    return (logps, entropy) if return_entropy else logps
