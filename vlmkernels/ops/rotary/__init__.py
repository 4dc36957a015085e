"""Rotary positions of queries and keys, in one pass. Torch only: triton and ``_C`` load on first use."""

from collections.abc import Sequence

import torch
from torch.library import define, impl, register_autograd, register_fake

from vlmkernels.backend import resolve, select
from vlmkernels.ops.checks import require, require_device, require_dtype, require_shape
from vlmkernels.ops.dispatch import needs_dispatcher

OP = "vlmkernels::rotary"
# query (B, S, Hq, D), key (B, S, Hk, D), cos and sin (B, S, P), or all without B; the results are contiguous. inverse: by
# -angle, the gradient. heads_first: query and key are (B, H, S, D), and so are the results, whose memory is (B, S, H, D).
define(
    OP,
    "(Tensor query, Tensor key, Tensor cos, Tensor sin, bool inverse, str backend, bool heads_first=False) -> (Tensor, Tensor)",
)


def _output(x, heads_first):
    if not heads_first:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    _, heads, tokens, width = x.shape
    strides = (tokens * heads * width, width, heads * width, 1)
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)


def _rotary(query, key, cos, sin, inverse, backend, heads_first=False):
    outputs = _output(query, heads_first), _output(key, heads_first)
    if query.numel() or key.numel():
        select("rotary", backend, query, key, cos, sin).fwd(query, key, cos, sin, inverse, heads_first, *outputs)
    return outputs


impl(OP, "default", _rotary)


@register_fake(OP)
def _rotary_fake(query, key, cos, sin, inverse, backend, heads_first=False):
    return _output(query, heads_first), _output(key, heads_first)


def _save(ctx, inputs, output):
    _, _, cos, sin, ctx.inverse, ctx.backend, ctx.heads_first = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, *gradients):
    gradients = (g if g.stride(-1) == 1 else g.contiguous() for g in gradients)
    gradients = _apply(*gradients, *ctx.saved_tensors, not ctx.inverse, ctx.backend, ctx.heads_first)
    return *gradients, None, None, None, None, None


register_autograd(OP, _backward, setup_context=_save)


class _Rotary(torch.autograd.Function):
    """The op where nothing needs the dispatcher. Its gradient can be differentiated: it is the op again."""

    @staticmethod
    def forward(ctx, *args):
        outputs = _rotary(*args)
        _save(ctx, args, outputs)
        return outputs

    backward = staticmethod(_backward)


def _apply(*args):
    if needs_dispatcher(*args[:4]):
        return torch.ops.vlmkernels.rotary(*args)
    return _Rotary.apply(*args) if torch.is_grad_enabled() else _rotary(*args)


def rotary(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    heads_first: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys turned by their tokens' angles: rotary positions, of vision towers (2-D) and of text (M-RoPE) alike.

    Equivalent to::

        def turn(x):  # (..., H, D)
            first, second, rest = x.float().split([P, P, D - 2 * P], dim=-1)
            c, s = cos.float().unsqueeze(-2), sin.float().unsqueeze(-2)
            return torch.cat([first * c - second * s, second * c + first * s, rest], dim=-1).to(x.dtype)


        turn(query), turn(key)

    in one read and one write of each. This is ``apply_rotary_pos_emb_vision`` of transformers, whose ``cos`` and ``sin`` hold
    every angle twice, and ``apply_rotary_pos_emb`` of its text models but for that one's roundings to 16 bits in between.

    Args:
        query: (N, Hq, D) or (B, S, Hq, D), fp32, bf16 or fp16 (fp64 in the reference). The last axis is contiguous, the others
            have any strides, so parts of a fused qkv and transposed views are not copied.
        key: (N, Hk, D) or (B, S, Hk, D), in the dtype of ``query``.
        cos, sin: (N, P) or (B, S, P), or with axes of 1 that all tokens share: of the angle of pair j, which is the features
            (j, j + P); 2 P <= D, and features from 2 P on stay. fp32, bf16 or fp16. See ``rotary_table``.
        heads_first: query and key are (B, Hq, S, D) and (B, Hk, S, D), as in the attention of transformers. So are the results,
            whose memory is that of contiguous (B, S, H, D). Equivalent to transposing all four, at less cost.
        backend: see ``vlmkernels.backend``.

    Returns:
        ``(query, key)``, contiguous unless heads_first, in their dtype. Computed in fp32: no result is further from the exact
        one than ``eps(fp32) (|x_j cos| + |x_{j+P} sin|)`` and its one rounding. Gradients, which are turned back, go to query
        and key.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device, or a ``cos`` or ``sin`` that wants a gradient.
        NotImplementedError: the named backend does not serve these tensors.

    Source: Su et al., RoFormer (https://arxiv.org/abs/2104.09864), section 3.2.
    """
    tokens = _check(query, key, cos, sin, heads_first)
    if cos.shape[:-1] != tokens:
        cos, sin = cos.expand(*tokens, -1), sin.expand(*tokens, -1)
    return _apply(query, key, cos, sin, False, resolve(backend), heads_first)


def _check(query, key, cos, sin, heads_first) -> tuple[int, ...]:
    """The sizes of the axes of tokens."""
    if not query.is_floating_point():
        raise TypeError(f"query must be floating point, got {query.dtype}")
    shape, key_shape, table = query.shape, key.shape, cos.shape
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
        rule = "have the tokens of query, or 1 in their place, and at most D / 2 pairs"
        raise ValueError(f"cos must {rule}, got {tuple(table)} for {tuple(shape)}")
    require_shape("sin", sin, table, "cos")
    require_dtype("key", key, query.dtype)
    require_dtype("cos", cos, torch.float32, torch.bfloat16, torch.float16, torch.float64)
    require_dtype("sin", sin, cos.dtype)
    device = query.device
    for name, tensor in (("key", key), ("cos", cos), ("sin", sin)):
        require_device(name, tensor, device, "query")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos and sin must not require gradients: they get none, got some that do")
    return tokens


def rotary_table(position_ids: torch.Tensor, inv_freq: torch.Tensor, axes: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of each token's angles, for ``rotary``: pair j turns by ``position_ids[axes[j]] * inv_freq[j]``.

    Once per forward pass, for all its layers.

    Args:
        position_ids: (A, ...) of any integer dtype, the positions of tokens along A axes: (3, B, S) time, height and width of
            M-RoPE; (2, N) row and column of patches (``VisionLayout.position_ids.T``).
        inv_freq: (P,) fp32, the angle of each pair per position.
        axes: P integers, which axis turns each pair: see ``mrope_axes``; ``[0] * (P // 2) + [1] * (P // 2)`` in the vision
            towers of the Qwen-VL models, whose ``inv_freq`` is the same P / 2 numbers twice.

    Returns:
        cos, sin: (..., P) fp32.
    """
    require(inv_freq.dim() == 1 and len(inv_freq) == len(axes), "axes", f"be one per pair, {len(inv_freq)}", len(axes))
    known = all(0 <= axis < len(position_ids) for axis in axes)
    require(known, "axes", f"be in [0, {len(position_ids)}), the axes of position_ids", list(axes))
    index = torch.tensor(axes).to(position_ids.device, non_blocking=True)
    angles = position_ids.movedim(0, -1).index_select(-1, index).float() * inv_freq.float()
    return angles.cos(), angles.sin()


def mrope_axes(section: Sequence[int], *, interleaved: bool = False) -> list[int]:
    """Which of the axes time (0), height (1) and width (2) turns each pair of M-RoPE.

    Args:
        section: (3,) ``mrope_section`` of the model's ``rope_parameters``: how many pairs each axis has.
        interleaved: Qwen3-VL and later: time, height, width, time, ... and time alone once the others have had their share.
            Otherwise (Qwen2-VL, Qwen2.5-VL) one section after another.
    """
    require(len(section) == 3 and min(section) >= 0, "section", "be three numbers of pairs", list(section))
    if not interleaved:
        return [axis for axis, pairs in enumerate(section) for _ in range(pairs)]
    return [j % 3 if j < 3 * section[j % 3] else 0 for j in range(sum(section))]
