"""Log-probability of chosen tokens from hidden states and the weight of the language-model head."""

import torch

from vlmkernels.backend import resolve
from vlmkernels.ops.checks import require, require_device, require_dtype, require_indices, require_positive, require_shape
from vlmkernels.ops.gather_logps import gather_logps


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
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of ``targets`` under ``softmax(head(hidden) / temperature)``, and that softmax's entropy.

    Equivalent to::

        logits = hidden.flatten(0, -2)[rows] @ weight.T + bias
        logits = softcap * tanh(logits * logit_scale / softcap)
        gather_logps(logits, targets, temperature=temperature, mask=mask, return_entropy=return_entropy)

    Only the rows asked for are multiplied.

    Args:
        hidden: (..., H), floating point.
        weight: (V, H), the head, in the dtype of ``hidden``.
        targets: (...) like the leading axes of ``hidden``, or like ``rows``; int64 in [0, V).
        bias: (V,) or None.
        temperature: divides the logits; > 0.
        logit_scale: multiplies the logits before the cap (Cohere, Granite).
        softcap: caps the logits at ± this value by tanh (Gemma); > 0 or None.
        mask: bool, like ``targets``. Where false nothing is computed: the result is 0 and so is the gradient.
        rows: int64: flat indices into the leading axes of ``hidden``, one per result. Rows may repeat (their gradients add
            up): in a packed group the last prompt token predicts the first token of every completion.
        return_entropy: also return the entropy, in nats, differentiable.
        backend: of the ``gather_logps`` inside, see ``vlmkernels.backend``.

    Returns:
        ``logps`` like ``targets``, fp32 (fp64 for fp64); with ``return_entropy`` the pair ``(logps, entropy)``.
        Gradients go to ``hidden``, ``weight`` and ``bias``.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device, temperature or softcap; on the CPU also an index out of range.
    """
    backend = resolve(backend)
    require(hidden.is_floating_point(), "hidden", "be floating point", hidden.dtype, TypeError)
    require_dtype("weight", weight, hidden.dtype)
    require_device("weight", weight, hidden.device, "hidden")
    require(
        weight.dim() == 2 and weight.shape[1] == hidden.shape[-1],
        "weight",
        f"be (V, H) with the width of hidden, H = {hidden.shape[-1]}",
        tuple(weight.shape),
    )
    require_positive("temperature", temperature)
    if softcap is not None:
        require_positive("softcap", softcap)
    shape = hidden.shape[:-1] if rows is None else rows.shape
    require_shape("targets", targets, shape, "hidden without its width" if rows is None else "rows")
    require_dtype("targets", targets, torch.int64)
    if rows is not None:
        require_dtype("rows", rows, torch.int64)
        require_indices("rows", rows, hidden.shape[:-1].numel(), f"the rows of hidden {tuple(hidden.shape[:-1])}", mask)
    if mask is not None:
        require_shape("mask", mask, targets.shape, "targets")
        require_dtype("mask", mask, torch.bool)

    # The rows to multiply: gathered once, so that image, prompt and padding tokens never reach the GEMM.
    hidden, flat_targets = hidden.flatten(0, -2), targets.flatten()
    asked = None if mask is None else mask.flatten().nonzero().squeeze(1)
    source = asked if rows is None else (rows.flatten() if asked is None else rows.flatten()[asked])
    hidden = hidden if source is None else hidden[source]
    flat_targets = flat_targets if asked is None else flat_targets[asked]

    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits if logit_scale == 1.0 else logits * logit_scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    results = gather_logps(logits, flat_targets, temperature=temperature, return_entropy=return_entropy, backend=backend)
    results = results if return_entropy else (results,)
    if asked is not None:
        results = tuple(r.new_zeros(targets.numel()).index_copy(0, asked, r) for r in results)
    results = tuple(r.view(targets.shape) for r in results)
    return results if return_entropy else results[0]
