"""Attention of a decoding step over shared and own tokens. Imports only torch: triton and ``_C`` load on first use."""

import math
import numbers
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch.library import define, impl, register_fake

from vlmkernels.backend import resolve, select
from vlmkernels.ops.checks import dtype_name, require_device, require_dtype, require_number, require_shape, require_tensor
from vlmkernels.ops.decode_attention.inputs import MAX_LEVELS, KeyValues, as_level, require_values
from vlmkernels.ops.dispatch import needs_dispatcher

__all__ = ["KeyValues", "decode_attention"]

OP = "vlmkernels::decode_attention"
# own_key and own_value are the buffers of the last level, keys and values those of all others. The other lists have a field of
# every level.
define(
    OP,
    "(Tensor query, Tensor? key, Tensor? value, Tensor(a!) own_key, Tensor(b!) own_value, Tensor[] keys, Tensor[] values,"
    " Tensor[] lengths, Tensor?[] segments, Tensor?[] block_tables, Tensor?[] orders, Tensor?[] ranks, int? window,"
    " float scale, str backend) -> (Tensor, Tensor)",
)


def _outputs(query: torch.Tensor, own_value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    slots, heads, _ = query.shape
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(slots, heads, own_value.shape[3]), query.new_empty(slots, heads, dtype=lse_dtype)


def _select(
    query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None, levels: Sequence[KeyValues], backend: str
) -> Any:
    new = () if key is None or value is None else (key, value)
    return select("decode_attention", backend, query, *(x for level in levels for x in level[:2]), *new)


# The signatures of calls that passed the checks of dtypes, shapes, strides and devices, and their kernels. A decoder makes
# the same call in every layer and step, where these checks take as long as the kernels of a small model.
_known: dict[tuple[Any, ...] | None, Any] = {}
_MOST_KNOWN = 1024


def _signature(
    query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None, levels: Sequence[KeyValues], backend: str
) -> tuple[Any, ...] | None:
    """Return what the checks depend on; None if an argument must be converted or is wrong, or gradients could be wanted."""
    if torch.is_grad_enabled():
        return None
    signature: list[Any] = [backend]
    tensors: list[Any] = [query, key, value]
    for level in levels:
        if type(level) is not KeyValues:
            return None
        tensors += level
    for x in tensors:
        if x is None:
            signature.append(None)
        elif type(x) is torch.Tensor:
            signature += x.dtype, x.shape, x.stride(), x.device
        else:
            return None
    return tuple(signature)


def _run(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    levels: Sequence[KeyValues],
    window: int | None,
    scale: float,
    kernels: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    if query.is_cpu:
        require_values(levels, query.shape[0], key is not None)
    outputs = _outputs(query, levels[-1].value)
    if query.shape[0]:
        kernels.fwd(query, key, value, levels, window, scale, *outputs)
    return outputs


def _decode_attention(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    own_key: torch.Tensor,
    own_value: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    *fields, window, scale, backend = rest
    levels = [KeyValues(*row) for row in zip([*keys, own_key], [*values, own_value], *fields, strict=True)]
    return _run(query, key, value, levels, window, scale, _select(query, key, value, levels, backend))


impl(OP, "default", _decode_attention)


def _decode_attention_fake(
    query: torch.Tensor, key: Any, value: Any, own_key: torch.Tensor, own_value: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return _outputs(query, own_value)


register_fake(OP, _decode_attention_fake)


@overload
def decode_attention(
    query: torch.Tensor,
    levels: Sequence[KeyValues],
    *,
    key: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> torch.Tensor: ...


@overload
def decode_attention(
    query: torch.Tensor,
    levels: Sequence[KeyValues],
    *,
    key: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]: ...


def decode_attention(
    query: torch.Tensor,
    levels: Sequence[KeyValues],
    *,
    key: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Append a token to every slot and attend from it to all tokens on its path: a prompt, shared turns, its own tokens.

    Equivalent, for every slot s that reads segment n_l of level l, to::

        levels[-1].key[n_last, :, lengths[n_last]] = key[s]  # and the same for value; lengths[n_last] now counts it
        k, v = (torch.cat([x[n_l, :, : lengths[n_l]] for each level], 1)[:, -window:] for x in (keys, values))
        out[s] = scaled_dot_product_attention(query[s].unsqueeze(1), k, v, scale=scale, enable_gqa=True).squeeze(1)

    The keys of a segment are read once for all slots that read it. The result of a slot does not depend on other slots.

    Args:
        query: (S, Hq, D), fp32, bf16 or fp16 (the reference also supports fp64), one token per slot.
        levels: 1 to 8 levels, from the root to the slots' own tokens. Hkv divides Hq, and the dtype is that of ``query``.
        key: (S, Hkv, D), the new token of each slot. It is written into the last level, where each slot reads a segment of its
            own, at the length of the segment. ``lengths`` does not change: add 1 after the last layer. A slot whose segment
            is -1 in the last level is not in use, or only reads: its token is not written, and not seen.
        value: (S, Hkv, Dv).
        window: a slot sees the last ``window`` tokens of its path, with the new one. Default: all.
        scale: multiplies the scores. Default 1 / sqrt(D).
        return_lse: also return the log-sum-exp of the scores.
        backend: see ``vlmkernels.backend``.

    Returns:
        (S, Hq, Dv) in the dtype of ``query``, or with ``return_lse`` also (S, Hq) fp32. Scores, softmax and sums are in fp32
        (triton and cuda round the probabilities of 16-bit values to 16 bits, cpp those of bf16 values on a processor with
        AVX512_BF16). A slot that sees no token gets 0 and -inf. On a GPU, a slot whose segment or page does not exist or whose
        length is beyond its buffers gets NaN, and nothing is written outside of the buffers. There are no gradients.

    Raises:
        ValueError, TypeError: a shape, dtype or device is wrong; on a CPU also a length, a segment or a page.
        NotImplementedError: no backend supports these tensors.

    Source: Juravsky et al., Hydragen (https://arxiv.org/abs/2402.05099); Dao et al., Flash-Decoding
    (https://pytorch.org/blog/flash-decoding/).
    """
    if window is not None:
        require_number("window", window, "be an integer >= 1", numbers.Integral)
        if window < 1:
            raise ValueError(f"window must be an integer >= 1, got {window}")
        window = int(window)
    if scale is not None:
        require_number("scale", scale, "be finite")
        if not math.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale}")
    backend = resolve("decode_attention", backend)
    signature = None if torch.compiler.is_compiling() else _signature(query, key, value, levels, backend)
    kernels = _known.get(signature)
    given = levels
    if kernels is None:
        levels = _checked(query, key, value, levels)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if needs_dispatcher(query, key, value, *(x for level in levels for x in level[:2])):
        keys, values, *fields = map(list, zip(*levels, strict=True))
        op = torch.ops.vlmkernels.decode_attention
        out, lse = op(query, key, value, keys[-1], values[-1], keys[:-1], values[:-1], *fields, window, scale, backend)
    else:
        if kernels is None:
            kernels = _select(query, key, value, levels, backend)
            if signature is not None and all(map(_same, given, levels)):
                if len(_known) >= _MOST_KNOWN:
                    _known.clear()
                _known[signature] = kernels
        out, lse = _run(query, key, value, levels, window, scale, kernels)
    return (out, lse) if return_lse else out


def _same(level: KeyValues, other: KeyValues) -> bool:
    return all(x is y for x, y in zip(level, other, strict=True))


def _checked(
    query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None, levels: Sequence[KeyValues]
) -> list[KeyValues]:
    """Check all that does not depend on the values of tensors, and return the levels with integers as int32."""
    require_tensor("query", query)
    if query.dim() != 3 or not query.shape[1] or not query.shape[2]:
        raise ValueError(f"query must be (S, Hq, D) with at least one head of width 1, got {tuple(query.shape)}")
    if not query.is_floating_point():
        raise TypeError(f"query must be floating point, got {dtype_name(query.dtype)}")
    if not 1 <= len(levels) <= MAX_LEVELS:
        raise ValueError(f"levels must be 1 to {MAX_LEVELS}, got {len(levels)}")
    first = as_level(0, levels[0], query, None)
    levels = [first, *(as_level(index, level, query, first) for index, level in enumerate(levels) if index)]
    if (key is None) != (value is None):
        raise ValueError(f"key and value must be given together, got {'value' if key is None else 'key'} only")
    if key is not None and value is not None:
        own = levels[-1]
        for name, x, like in (("key", key, own.key), ("value", value, own.value)):
            require_tensor(name, x)
            require_dtype(name, x, query.dtype)
            require_device(name, x, query.device, "query")
            require_shape(name, x, (len(query), like.shape[1], like.shape[3]), "a token of the last level per slot")
    tensors = (query, key, value, *(x for level in levels for x in level[:2]))
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise ValueError("query, key, value and levels must not require gradients, because decode_attention computes none")
    return levels
