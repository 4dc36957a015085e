"""Rotary positions of queries and keys, in one pass. Imports only torch: triton and ``_C`` load on first use."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.library import define, impl, register_autograd, register_fake

from vlmkernels.backend import resolve, select
from vlmkernels.ops.checks import require_device, require_dtype, require_shape
from vlmkernels.ops.dispatch import needs_dispatcher

__all__ = ["mrope_axes", "rotary", "rotary_table"]

OP = "vlmkernels::rotary"
# query is (B, S, Hq, D), key (B, S, Hk, D), cos and sin (B, S, P), or all have no B; the results are contiguous. With inverse,
# the op rotates by -angle, for the gradient. With heads_first, query, key and the results are (B, H, S, D), and the memory of
# the results is that of contiguous (B, S, H, D).
define(
    OP,
    "(Tensor query, Tensor key, Tensor cos, Tensor sin, bool inverse, str backend, bool heads_first=False) -> (Tensor, Tensor)",
)


def _output(x: torch.Tensor, heads_first: bool) -> torch.Tensor:
    if not heads_first:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    _, heads, tokens, width = x.shape
    strides = (tokens * heads * width, width, heads * width, 1)
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)


def _rotary(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    inverse: bool,
    backend: str,
    heads_first: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = _output(query, heads_first), _output(key, heads_first)
    if query.numel() or key.numel():
        select("rotary", backend, query, key, cos, sin).fwd(query, key, cos, sin, inverse, heads_first, *outputs)
    return outputs


impl(OP, "default", _rotary)


def _rotary_fake(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    inverse: bool,
    backend: str,
    heads_first: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _output(query, heads_first), _output(key, heads_first)


register_fake(OP, _rotary_fake)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, _, cos, sin, ctx.inverse, ctx.backend, ctx.heads_first = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, dquery: torch.Tensor, dkey: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    dquery, dkey = (g if g.stride(-1) == 1 else g.contiguous() for g in (dquery, dkey))
    cos, sin = ctx.saved_tensors
    dquery, dkey = _apply(dquery, dkey, cos, sin, not ctx.inverse, ctx.backend, ctx.heads_first)
    return dquery, dkey, None, None, None, None, None


register_autograd(OP, _backward, setup_context=_save)


class _Rotary(torch.autograd.Function):
    """The op without the dispatcher. Its gradient is the op itself, so double backward is supported."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = _rotary(*args)
        _save(ctx, args, outputs)
        return outputs

    backward = staticmethod(_backward)


def _apply(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    inverse: bool,
    backend: str,
    heads_first: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    run: Any = _Rotary.apply if torch.is_grad_enabled() else _rotary
    if needs_dispatcher(query, key, cos, sin):
        run = torch.ops.vlmkernels.rotary
    results: tuple[torch.Tensor, torch.Tensor] = run(query, key, cos, sin, inverse, backend, heads_first)
    return results


def rotary(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    heads_first: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys by the angles of their tokens: rotary position embeddings of vision towers and of text.

    Equivalent to::

        def rotate(x):  # (..., H, D)
            first, second, rest = x.float().split([P, P, D - 2 * P], dim=-1)
            c, s = cos.float().unsqueeze(-2), sin.float().unsqueeze(-2)
            return torch.cat([first * c - second * s, second * c + first * s, rest], dim=-1).to(x.dtype)


        rotate(query), rotate(key)

    in one read and one write of each. It replaces ``apply_rotary_pos_emb_vision`` and ``apply_rotary_pos_emb`` of transformers,
    whose ``cos`` and ``sin`` hold every angle twice, and rounds to 16 bits only once, at the end.

    Args:
        query: (N, Hq, D) or (B, S, Hq, D), fp32, bf16 or fp16 (the reference also supports fp64). The last axis must be
            contiguous; the others may have any stride, so parts of a fused qkv and transposed views are not copied.
        key: (N, Hk, D) or (B, S, Hk, D), in the dtype of ``query``.
        cos, sin: (N, P) or (B, S, P), or with axes of size 1 that are broadcast, fp32, bf16 or fp16. Element j is the cosine or
            sine of the angle of pair j, the features j and j + P. 2 P <= D; features from 2 P on are copied. See
            ``rotary_table``.
        heads_first: query and key are (B, Hq, S, D) and (B, Hk, S, D), as in the attention of transformers. The results have
            these shapes and the memory layout of contiguous (B, S, H, D). Equivalent to transposing inputs and results.
        backend: see ``vlmkernels.backend``.

    Returns:
        ``(query, key)`` in their dtype, contiguous unless heads_first. Computed in fp32: the error of a result is at most
        ``eps(fp32) (|x_j cos| + |x_{j+P} sin|)`` plus one rounding to its dtype. Query and key get gradients: the gradients of
        the results, rotated by the negative angles.

    Raises:
        ValueError, TypeError: a shape, dtype or device is wrong, or ``cos`` or ``sin`` require gradients.
        NotImplementedError: the named backend does not support these tensors.

    Source: Su et al., RoFormer (https://arxiv.org/abs/2104.09864), section 3.2.
    """
    tokens = _check(query, key, cos, sin, heads_first)
    if cos.shape[:-1] != tokens:
        cos, sin = cos.expand(*tokens, -1), sin.expand(*tokens, -1)
    return _apply(query, key, cos, sin, False, resolve("rotary", backend), heads_first)


def _check(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads_first: bool) -> tuple[int, ...]:
    """Check the arguments, and return the sizes of the token axes."""
    if not query.is_floating_point():
        raise TypeError(f"query must be floating point, got {query.dtype}")
    shape, key_shape, table = query.shape, key.shape, cos.shape
    tokens: tuple[int, ...]
    if heads_first:
        if len(shape) != 4:
            raise ValueError(f"query must be (B, Hq, S, D) with heads_first, got {tuple(shape)}")
        tokens, key_tokens = shape[:1] + shape[2:-1], key_shape[:1] + key_shape[2:-1]
    else:
        if len(shape) not in (3, 4):
            raise ValueError(f"query must be (N, Hq, D) or (B, S, Hq, D), got {tuple(shape)}")
        tokens, key_tokens = shape[:-2], key_shape[:-2]
    width = shape[-1]
    if len(key_shape) != len(shape) or key_tokens != tokens or key_shape[-1] != width:
        raise ValueError(f"key must have the tokens and the width of query, got {tuple(key_shape)} for {tuple(shape)}")
    fits = len(table) == len(tokens) + 1 and 2 * table[-1] <= width
    if not fits or (table[:-1] != tokens and any(n not in (1, own) for n, own in zip(table[:-1], tokens, strict=True))):
        raise ValueError(
            "cos must have the tokens of query, or 1 in their place, and at most D / 2 pairs,"
            f" got {tuple(table)} for {tuple(shape)}"
        )
    require_shape("sin", sin, table, "cos")
    require_dtype("key", key, query.dtype)
    require_dtype("cos", cos, torch.float32, torch.bfloat16, torch.float16, torch.float64)
    require_dtype("sin", sin, cos.dtype)
    device = query.device
    for name, tensor in (("key", key), ("cos", cos), ("sin", sin)):
        require_device(name, tensor, device, "query")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos and sin must not require gradients, because rotary computes none for them")
    return tokens


def rotary_table(position_ids: torch.Tensor, inv_freq: torch.Tensor, axes: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute cos and sin for ``rotary``, once for all layers of a forward pass.

    Equivalent to::

        angles = position_ids[axes].movedim(0, -1) * inv_freq
        cos, sin = angles.cos(), angles.sin()

    Args:
        position_ids: (A, ...) of any integer dtype, the positions of tokens on A axes. For M-RoPE: (3, B, S), time, height and
            width. For patches: (2, N), row and column (``VisionLayout.position_ids.T``).
        inv_freq: (P,) fp32, the angle of each pair per position.
        axes: P integers, the axis of each pair. For M-RoPE, see ``mrope_axes``. For the vision towers of the Qwen-VL models:
            ``[0] * (P // 2) + [1] * (P // 2)``, where ``inv_freq`` holds P / 2 numbers twice.

    Returns:
        cos, sin: (..., P) fp32.

    Raises:
        ValueError: there is not one axis per pair, or an axis is not one of ``position_ids``.
    """
    if inv_freq.dim() != 1 or len(inv_freq) != len(axes):
        raise ValueError(f"axes must be one per pair, {len(inv_freq)}, got {len(axes)}")
    if any(not 0 <= axis < len(position_ids) for axis in axes):
        raise ValueError(f"axes must be in [0, {len(position_ids)}), the axes of position_ids, got {list(axes)}")
    index = torch.tensor(axes).to(position_ids.device, non_blocking=True)
    angles = position_ids.movedim(0, -1).index_select(-1, index).float() * inv_freq.float()
    return angles.cos(), angles.sin()


def mrope_axes(section: Sequence[int], *, interleaved: bool = False) -> list[int]:
    """Return the axis of each pair of M-RoPE: time (0), height (1) or width (2).

    Args:
        section: (3,), the number of pairs of each axis: ``mrope_section`` of the model's ``rope_parameters``.
        interleaved: if true, the axes alternate (time, height, width, time, ...) until height and width have all their pairs,
            and the remaining pairs are time, as in Qwen3-VL and later. If false, the pairs of an axis are adjacent, as in
            Qwen2-VL and Qwen2.5-VL.

    Returns:
        P integers, P the sum of ``section``.

    Raises:
        ValueError: ``section`` is not three numbers >= 0.
    """
    if len(section) != 3 or min(section) < 0:
        raise ValueError(f"section must be three numbers >= 0, got {list(section)}")
    if not interleaved:
        return [axis for axis, pairs in enumerate(section) for _ in range(pairs)]
    return [j % 3 if j < 3 * section[j % 3] else 0 for j in range(sum(section))]
