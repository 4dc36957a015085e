"""Sampling tokens from logits. Imports only torch: triton and ``_C`` load on first use."""

import numbers
from typing import Any

import torch
from torch.library import define, impl, register_fake

from vlmkernels.backend import resolve, select
from vlmkernels.ops.arguments import as_indices, as_mask, as_tensor
from vlmkernels.ops.checks import (
    require_device,
    require_factor,
    require_indices,
    require_nowhere,
    require_number,
    require_shape,
    require_tensor,
)
from vlmkernels.ops.dispatch import schema, unpack
from vlmkernels.ops.sample_logps.inputs import Filters, Inputs, SampledTokens

__all__ = ["SampledTokens", "sample_logps"]

FWD = "vlmkernels::sample_logps"

define(FWD, f"({schema(Inputs, Filters)}, str backend) -> ({schema(SampledTokens)})")


def check_values(inputs: Inputs) -> None:
    """Check on the CPU that the numbers of ``uniform`` and ``banned_rows`` are in range."""
    uniform = inputs.uniform
    if uniform is not None and uniform.device.type == "cpu":
        require_nowhere(~((uniform >= 0) & (uniform < 1)), "uniform", "be in [0, 1)", uniform)
    if inputs.banned_rows is not None and inputs.banned is not None:
        require_indices("banned_rows", inputs.banned_rows, len(inputs.banned), "the rows of banned")


@impl(FWD, "default")
def _fwd(*args: Any) -> SampledTokens:
    *rest, backend = args
    inputs, filters = unpack(rest, Inputs, Filters)
    check_values(inputs)
    outputs = SampledTokens.empty(inputs.logits)
    if len(inputs.logits):
        select("sample_logps", backend, inputs.logits).fwd(inputs, filters, outputs)
    return outputs


def _fwd_fake(*args: Any) -> SampledTokens:
    return SampledTokens.empty(args[0])


register_fake(FWD, _fwd_fake)


def filters_of(
    temperature: float, top_k: int | None, top_p: float | None, min_p: float | None, repetition_penalty: float
) -> Filters:
    """Check the options and return them with None replaced by the value that keeps all tokens."""
    top_k, top_p, min_p = top_k or 0, 1.0 if top_p is None else top_p, min_p or 0.0
    require_factor("temperature", temperature)
    require_factor("repetition_penalty", repetition_penalty)
    require_number("top_k", top_k, "be None or an integer >= 0", numbers.Integral)
    require_number("top_p", top_p, "be None or in (0, 1]")
    require_number("min_p", min_p, "be None or in [0, 1]")
    if not 0 <= top_k < 2**63:
        raise ValueError(f"top_k must be None or an integer in [0, 2**63), got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be None or in (0, 1], got {top_p}")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p must be None or in [0, 1], got {min_p}")
    return Filters(float(temperature), int(top_k), float(top_p), float(min_p), float(repetition_penalty))


def inputs_of(
    name: str,
    source: torch.Tensor,
    vocab: int,
    uniform: Any,
    seen: Any,
    banned: Any,
    banned_rows: Any,
    repetition_penalty: float,
) -> Inputs:
    """Check and convert the arguments beside ``source`` (N, ...), the argument ``name``, and return them as its inputs."""
    device, num = source.device, len(source)
    if uniform is not None:
        uniform = as_tensor("uniform", uniform, device, torch.float64)
        if not uniform.is_floating_point():
            raise TypeError(f"uniform must be floating point, got {uniform.dtype}")
        uniform = uniform.double()
        require_shape("uniform", uniform, (num,), f"the rows of {name}")
    seen, banned = as_mask("seen", seen, device), as_mask("banned", banned, device)
    if repetition_penalty == 1:
        seen = None
    elif seen is None:
        raise ValueError(f"seen must be given with a repetition_penalty, got None with {repetition_penalty}")
    else:
        require_shape("seen", seen, (num, vocab), f"{name} and the vocabulary")
    if banned is not None:
        if banned.dim() not in (1, 2) or banned.shape[-1] != vocab or not banned.numel():
            raise ValueError(f"banned must be (V,) or (A, V) with A >= 1 and V = {vocab}, got {tuple(banned.shape)}")
        if (banned.dim() == 2) != (banned_rows is not None):
            got = "None" if banned_rows is None else "a tensor"
            raise ValueError(f"banned_rows must be given exactly if banned is (A, V), got {got} with {tuple(banned.shape)}")
        banned = banned.view(-1, vocab) if banned.dim() == 1 else banned
    elif banned_rows is not None:
        raise ValueError("banned_rows must be None without banned, got a tensor")
    if banned_rows is not None:
        banned_rows = as_indices("banned_rows", banned_rows, device=device)
        require_shape("banned_rows", banned_rows, (num,), f"the rows of {name}")
    for argument, tensor in {"uniform": uniform, "seen": seen, "banned": banned, "banned_rows": banned_rows}.items():
        if tensor is not None:
            require_device(argument, tensor, device, name)
    return Inputs(source, uniform, seen, banned, banned_rows)


@torch.no_grad()
def sample_logps(
    logits: torch.Tensor,
    uniform: torch.Tensor | None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = 1.0,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seen: torch.Tensor | None = None,
    banned: torch.Tensor | None = None,
    banned_rows: torch.Tensor | None = None,
    backend: str = "auto",
) -> SampledTokens:
    """Sample a token from each row of logits, and compute its log-probability, the kept mass and the entropy.

    Equivalent to::

        scores = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
        scores = scores.masked_fill(banned[banned_rows], -torch.inf) / temperature
        scores = min_p_warper(top_p_warper(top_k_warper(scores)))  # as in transformers
        sums = scores.softmax(-1).double().cumsum(-1)
        ids = torch.searchsorted(sums, uniform.unsqueeze(1), right=True).squeeze(1)
        logps, entropy = gather_logps(logits, ids, temperature=temperature, return_entropy=True)
        log_kept_mass = logps - scores.log_softmax(-1).gather(1, ids.unsqueeze(1)).squeeze(1)

    but without a pass over the logits for each line: the kernels read them once, and then the tokens that can pass the
    filters. The same ``uniform`` gives the same token on every backend, up to rounding of the sums, whatever the other rows
    are. A token of probability 0 is never sampled; a share below 2^-126 of the greatest probability counts as 0.

    Args:
        logits: (N, V), fp32, bf16 or fp16 (the reference also supports fp64). The rows may have any stride.
        uniform: (N,) fp64 in [0, 1), one random number per row. None: the greatest score, of equal ones the smallest id; the
            filters have no effect on it.
        temperature: divides the logits; > 0.
        top_k: keep the ``top_k`` greatest scores, and those equal to the last of them. None or 0: all.
        top_p: then keep the fewest of the greatest scores whose probabilities, normalized over those that top_k kept, add up to
            ``top_p``; in (0, 1]. Of equal scores at the boundary, the smallest ids are kept. (transformers keeps as many, but
            which ones depends on its sort.)
        min_p: keep probabilities of at least ``min_p`` times the greatest; in [0, 1]. None or 0: all.
        repetition_penalty: divides the logits of ``seen`` tokens if they are >= 0 and multiplies them otherwise; > 0.
        seen: (N, V) bool, the tokens that the penalty applies to.
        banned: (V,) bool, tokens that are not sampled, or (A, V), tables of them.
        banned_rows: (N,) integers in [0, A), the table of each row.
        backend: see ``vlmkernels.backend``.

    Returns:
        ``SampledTokens``: ``ids``, and ``logps``, ``log_kept_mass`` and ``entropy`` in fp32 (fp64 for fp64 logits). logps and
        entropy are those of ``softmax(logits / temperature)``, over all tokens and without the penalty. Greedy, log_kept_mass
        equals logps. If ids is negative, the rest is NaN: -1, the row has a logit that is NaN or +inf; -2, all its tokens are
        banned or have logit -inf. No gradients.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option is wrong, or (on the CPU) a number of ``uniform`` or
            ``banned_rows`` is out of range. On a GPU, where this check would wait for the device, ``uniform`` is clamped to
            [0, 1), NaN to 0, and the row of a wrong ``banned_rows`` has ids -1.
        NotImplementedError: the named backend does not support these tensors.

    Source: https://arxiv.org/abs/1904.09751 for top_p, https://arxiv.org/abs/2407.01082 for min_p.
    """
    require_tensor("logits", logits)
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be (N, V) with V >= 1, got {tuple(logits.shape)}")
    filters = filters_of(temperature, top_k, top_p, min_p, repetition_penalty)
    inputs = inputs_of("logits", logits, logits.shape[1], uniform, seen, banned, banned_rows, repetition_penalty)
    return SampledTokens(*torch.ops.vlmkernels.sample_logps(*inputs, *filters, resolve("sample_logps", backend)))
