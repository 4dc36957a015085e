"""Log-probability of chosen tokens from logits. Torch only: triton and ``_C`` load on first use."""

import torch
from torch.library import define, impl, register_autograd, register_fake

from vlmkernels.backend import resolve, select
from vlmkernels.ops.checks import require_factor, require_indices, require_targets

FWD = "vlmkernels::gather_logps_fwd"
BWD = "vlmkernels::gather_logps_bwd"
BWD_INPLACE = "vlmkernels::gather_logps_bwd_"

define(
    FWD,
    "(Tensor logits, Tensor targets, Tensor? mask, Tensor? rows, float temperature, bool return_entropy,"
    " bool inplace_backward, str backend) -> (Tensor logp, Tensor entropy, Tensor stats)",
)
_GRADIENT = (
    "Tensor? dlogp, Tensor? dentropy, Tensor targets, Tensor entropy, Tensor stats, Tensor? mask, Tensor? rows,"
    " float temperature, str backend"
)
define(BWD, f"(Tensor logits, {_GRADIENT}) -> Tensor")
define(BWD_INPLACE, f"(Tensor(a!) logits, {_GRADIENT}) -> ()")


def _outputs(logits, targets, return_entropy):
    """logp; entropy or (0,); stats (..., 2): m, the maximum of the row x or a little less, and log sum exp((x - m) / T)."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logp = torch.empty(targets.shape, dtype=dtype, device=logits.device)
    return logp, logp.new_empty(targets.shape if return_entropy else 0), logp.new_empty((*targets.shape, 2))


@impl(FWD, "default")
def _fwd(logits, targets, mask, rows, temperature, return_entropy, inplace_backward, backend):
    *leading, vocab = logits.shape
    require_indices("targets", targets, vocab, "the vocabulary of logits", mask)
    if rows is not None:
        require_indices("rows", rows, leading_size(logits), f"the rows of logits {tuple(leading)}", mask)
    outputs = _outputs(logits, targets, return_entropy)
    if targets.numel():
        select("gather_logps", backend, logits).fwd(logits, targets, mask, rows, temperature, *outputs)
    return outputs


@register_fake(FWD)
def _fwd_fake(logits, targets, mask, rows, temperature, return_entropy, inplace_backward, backend):
    return _outputs(logits, targets, return_entropy)


def leading_size(logits: torch.Tensor) -> int:
    """The number of rows of logits, N."""
    return logits.shape[:-1].numel()


def _write_gradient(out, logits, dlogp, dentropy, targets, entropy, stats, mask, rows, temperature, backend):
    """Write d/dlogits to every element of ``out``, which may be ``logits`` itself."""
    num = targets.numel()
    dlogp = torch.zeros(num, dtype=stats.dtype, device=stats.device) if dlogp is None else dlogp.reshape(num)
    results = [dlogp, targets.reshape(num), stats.reshape(num, 2)]
    results += [None, None] if dentropy is None else [dentropy.reshape(num), entropy.reshape(num)]
    starts = None
    if rows is not None:
        # Rows may repeat: sort the results by row, masked ones past the end; those of row n are [starts[n], starts[n + 1]).
        end = leading_size(logits)
        keys = rows.reshape(num) if mask is None else rows.reshape(num).masked_fill(~mask.reshape(num), end)
        keys, order = keys.sort()
        starts = torch.searchsorted(keys, torch.arange(end + 1, device=keys.device))
        results, mask = [t if t is None else t[order] for t in results], None
    if out.numel():
        select("gather_logps", backend, logits).bwd(*results, logits, mask, starts, temperature, out)


@impl(BWD, "default")
def _bwd(logits, *gradient):
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _write_gradient(out, logits, *gradient)
    return out


@register_fake(BWD)
def _bwd_fake(logits, *gradient):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@impl(BWD_INPLACE, "default")
def _bwd_inplace(logits, *gradient):
    _write_gradient(logits, logits, *gradient)


@register_fake(BWD_INPLACE)
def _bwd_inplace_fake(logits, *gradient):
    pass


def _save(ctx, inputs, output):
    logits, targets, mask, rows, ctx.temperature, _, ctx.inplace, ctx.backend = inputs
    _, entropy, stats = output
    ctx.save_for_backward(logits, targets, entropy, stats, mask, rows)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _backward(ctx, dlogp, dentropy, _):
    logits, *saved = ctx.saved_tensors
    dentropy = None if dentropy is None or dentropy.numel() == 0 else dentropy
    gradient = (dlogp, dentropy, *saved, ctx.temperature, ctx.backend)
    dlogits = None
    if ctx.needs_input_grad[0] and not (dlogp is None and dentropy is None):
        if ctx.inplace:
            dlogits = logits.detach()
            torch.ops.vlmkernels.gather_logps_bwd_(dlogits, *gradient)
        else:
            dlogits = torch.ops.vlmkernels.gather_logps_bwd(logits, *gradient)
    return (dlogits, *[None] * 7)


register_autograd(FWD, _backward, setup_context=_save)


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
    """Log-probability of ``targets`` under the softmax of ``logits / temperature``, and that softmax's entropy.

    Equivalent to::

        logp_all = torch.log_softmax(logits.float() / temperature, dim=-1)
        logps = logp_all.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        entropy = -(logp_all.exp() * logp_all).sum(-1)

    without a tensor of the size of ``logits`` beyond its gradient: one read of the logits forward, one read and one write
    backward. With ``rows``, ``logits`` above is ``logits.flatten(0, -2)[rows]``.

    Args:
        logits: (..., V), fp32, bf16 or fp16 (fp64 in the reference). The last axis is contiguous; the others may have any
            stride, so ``logits[:, :-1]`` is not copied.
        targets: (...) like the leading axes of ``logits``, or like ``rows``; int64 in [0, V).
        temperature: divides the logits; > 0.
        mask: bool, like ``targets``. Where false, the logits are not read, the target may be anything, the results are 0
            and so is the gradient.
        rows: int64, any shape: flat indices into the leading axes of ``logits``, one per result, so that a block full of
            image and padding tokens is read only where a completion token is predicted. Rows may repeat (their gradients
            add up); those not named get gradient 0.
        return_entropy: also return the entropy, in nats, differentiable.
        inplace_backward: the backward pass writes the gradient over ``logits``, which then cannot be used again. Saves a
            tensor of the size of the logits.
        backend: see ``vlmkernels.backend``.

    Returns:
        ``logps`` like ``targets``, fp32 (fp64 for fp64); with ``return_entropy`` the pair ``(logps, entropy)``.
        Computed in fp32 whatever the dtype of ``logits``. A gradient goes to ``logits``, in its dtype.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or temperature; on the CPU also a target or row out of range
            (on a GPU that check would wait for the device: such a result is NaN there).
        NotImplementedError: the named backend does not serve these tensors.

    Source: the log-probability of Shao et al., DeepSeekMath (https://arxiv.org/abs/2402.03300), equation 3.
    """
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be (..., V) with V >= 1, got {tuple(logits.shape)}")
    require_factor("temperature", temperature)
    require_targets("logits", logits, "logits without the vocabulary", targets, mask, rows)
    if inplace_backward and any(stride == 0 < size - 1 for size, stride in zip(logits.shape, logits.stride(), strict=True)):
        raise ValueError(
            f"inplace_backward must be false for logits that share memory (an axis of stride 0), got {logits.stride()}"
        )
    logps, entropy, _ = torch.ops.vlmkernels.gather_logps_fwd(
        logits, targets, mask, rows, float(temperature), return_entropy, inplace_backward, resolve(backend)
    )
    return (logps, entropy) if return_entropy else logps
