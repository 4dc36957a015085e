"""Sampling tokens from hidden states and the head. Imports only torch: triton and ``_C`` load on first use."""

import math
from typing import Any, NamedTuple

import torch
from torch.library import define, impl, register_fake

from vlmkernels.backend import resolve, select
from vlmkernels.ops.dispatch import schema, unpack
from vlmkernels.ops.linear_logps.check import check, check_chunk, operands
from vlmkernels.ops.linear_logps.inputs import Operands, SelectedRows
from vlmkernels.ops.linear_logps.sweep import Head, Sweep, default_chunk_bytes
from vlmkernels.ops.sample_logps import check_values, filters_of, inputs_of
from vlmkernels.ops.sample_logps.inputs import Filters, Inputs, SampledTokens

__all__ = ["linear_sample_logps"]

FWD = "vlmkernels::linear_sample_logps"


class Layer(NamedTuple):
    """The arguments of the operator before those of ``sample_logps``."""

    weight: torch.Tensor  # (V, H)
    bias: torch.Tensor | None
    logit_scale: float
    softcap: float | None
    chunk_bytes: int


# ``logits`` of Inputs are the hidden states here.
define(
    FWD,
    f"({schema(Layer)}, {schema(Inputs).replace('logits', 'hidden')}, {schema(Filters)}, str backend)"
    f" -> ({schema(SampledTokens)})",
)


def _capped(logits: torch.Tensor, head: Head) -> torch.Tensor:
    """Return softcap * tanh(logits * logit_scale / softcap), in the memory of ``logits`` if they are not 16-bit."""
    assert head.softcap is not None
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.mul_(head.logit_scale / head.softcap).tanh_().mul_(head.softcap)


@impl(FWD, "default")
@torch.no_grad()
def _fwd(*args: Any) -> SampledTokens:
    *rest, backend = args
    layer, inputs, filters = unpack(rest, Layer, Inputs, Filters)
    hidden = inputs.logits
    check_values(inputs)
    outputs = SampledTokens.empty(hidden)
    head = Head.from_operands(hidden, layer.weight, layer.bias, filters.temperature, layer.logit_scale, layer.softcap)
    # Without a softcap, the scaling of the logits is part of the temperature.
    filters = filters._replace(temperature=1 / head.inverse)
    sweep = Sweep(hidden, head, None, layer.chunk_bytes)
    for chunk, states, room in sweep:
        logits = sweep.logits(states, room)
        scaled = logits if head.softcap is None else _capped(logits, head)
        sampled = SampledTokens(*(x[chunk] for x in outputs))
        uniform, seen, rows = (x if x is None else x[chunk] for x in (inputs.uniform, inputs.seen, inputs.banned_rows))
        part = Inputs(scaled, uniform, seen, inputs.banned, rows)
        select("sample_logps", backend, scaled).fwd(part, filters, sampled)
        if logits.dtype in (torch.bfloat16, torch.float16):
            _exact_logps(logits, states, head, sampled, greedy=inputs.uniform is None, backend=backend)
    return outputs


def _exact_logps(
    logits: torch.Tensor, states: torch.Tensor, head: Head, sampled: SampledTokens, *, greedy: bool, backend: str
) -> None:
    """Replace logps and entropy by those of ``linear_logps``, which computes the logit of each token again in fp32."""
    targets = sampled.ids.clamp(min=0)
    logps, stats = torch.empty_like(sampled.logps), sampled.logps.new_empty(len(targets), 2)
    exact = SelectedRows(targets, logps, torch.empty_like(logps), stats)
    select("linear_logps", backend, states).fwd(logits, states, exact, head)
    failed = sampled.ids < 0
    sampled.logps.copy_(exact.logp.masked_fill_(failed, math.nan))
    sampled.entropy.copy_(exact.entropy.masked_fill_(failed, math.nan))
    if greedy:
        sampled.log_kept_mass.copy_(sampled.logps)


def _fwd_fake(*args: Any) -> SampledTokens:
    return SampledTokens.empty(args[len(Layer._fields)])


register_fake(FWD, _fwd_fake)


@torch.no_grad()
def linear_sample_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    uniform: torch.Tensor | None,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = 1.0,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seen: torch.Tensor | None = None,
    banned: torch.Tensor | None = None,
    banned_rows: torch.Tensor | None = None,
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> SampledTokens:
    """Sample a token for each hidden state, and compute its log-probability, the kept mass and the entropy.

    Equivalent to::

        logits = (hidden @ weight.T + bias) * logit_scale
        logits = softcap * torch.tanh(logits / softcap)
        sample_logps(logits, uniform, ...)

    but it holds at most ``chunk_bytes`` of logits. The GEMM is that of ``linear_logps``, so that the log-probabilities of the
    sampled tokens are those of ``linear_logps(hidden, weight, ids, ...)``: up to rounding of their sums if the logits are fp32;
    bit by bit if they are 16-bit, where both compute the logit of the token again in fp32. (The token is then drawn from the
    rounded logits, and log_kept_mass is computed from these.)

    Args:
        hidden: (N, H), fp32, bf16 or fp16 (the reference also supports fp64). Autocast casts it like the input of a linear
            layer.
        weight: (V, H), the head, in the dtype of ``hidden``, or an fp32 master copy. A DTensor (FSDP2) over a mesh of one
            dimension is gathered.
        uniform: (N,) fp64 in [0, 1), or None: see ``sample_logps``.
        bias: (V,) or None.
        logit_scale: multiplies the logits before the softcap (Cohere, Granite); > 0.
        softcap: limits the logits to (-softcap, softcap) by tanh (Gemma); > 0, or None for no limit.
        temperature, top_k, top_p, min_p, repetition_penalty, seen, banned, banned_rows: see ``sample_logps``.
        chunk_bytes: upper bound on the memory of a chunk of logits, besides an fp32 copy of 16-bit logits with a softcap.
            Default: 2**28; on a GPU 2**30.
        backend: the backend of the kernels that read the logits, see ``vlmkernels.backend``.

    Returns:
        See ``sample_logps``.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option is wrong, or (on the CPU) a number of ``uniform`` or
            ``banned_rows`` is out of range; see ``sample_logps``.
        NotImplementedError: the named backend does not support these tensors.
    """
    hidden, weight, bias = operands(hidden, weight, bias)
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be (N, H), got {tuple(hidden.shape)}")
    targets = torch.empty(len(hidden), dtype=torch.int64, device=hidden.device)
    check(Operands(hidden, weight, bias, targets, None, None), temperature, logit_scale, softcap)
    filters = filters_of(temperature, top_k, top_p, min_p, repetition_penalty)
    inputs = inputs_of("hidden", hidden, len(weight), uniform, seen, banned, banned_rows, repetition_penalty)
    chunk_bytes = default_chunk_bytes(hidden.device) if chunk_bytes is None else chunk_bytes
    check_chunk("chunk_bytes", chunk_bytes, hidden, len(weight))
    layer = Layer(weight, bias, float(logit_scale), softcap, chunk_bytes)
    name = resolve("sample_logps", backend)
    return SampledTokens(*torch.ops.vlmkernels.linear_sample_logps(*layer, *inputs, *filters, name))
