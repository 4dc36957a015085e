"""Rotary positions of queries and keys, in one pass. Torch only: triton and ``_C`` load on first use."""

from collections.abc import Sequence

import torch
from torch.library import define, impl, register_autograd, register_fake

from vlmkernels.backend import resolve, select
from vlmkernels.ops.checks import require, require_device, require_dtype, require_shape

OP = "vlmkernels::rotary"
# query (B, S, Hq, D), key (B, S, Hk, D), cos and sin (B, S, P); the results are contiguous. inverse: by -angle, the gradient.
define(OP, "(Tensor query, Tensor key, Tensor cos, Tensor sin, bool inverse, str backend) -> (Tensor, Tensor)")


def _outputs(query, key):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key))


@impl(OP, "default")
def _rotary(query, key, cos, sin, inverse, backend):
    outputs = _outputs(query, key)
    if query.numel() or key.numel():
        select("rotary", backend, query, key, cos, sin).fwd(query, key, cos, sin, inverse, *outputs)
    return outputs


@register_fake(OP)
def _rotary_fake(query, key, cos, sin, inverse, backend):
    return _outputs(query, key)


def _save(ctx, inputs, output):
    _, _, cos, sin, ctx.inverse, ctx.backend = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, *gradients):
    gradients = (g if g.stride(-1) == 1 else g.contiguous() for g in gradients)
    return *torch.ops.vlmkernels.rotary(*gradients, *ctx.saved_tensors, not ctx.inverse, ctx.backend), None, None, None, None


register_autograd(OP, _backward, setup_context=_save)


def rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, backend: str = "auto"
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
        backend: see ``vlmkernels.backend``.

    Returns:
        ``(query, key)``, contiguous, in their dtype. Computed in fp32: no result is further from the exact one than
        ``eps(fp32) (|x_j cos| + |x_{j+P} sin|)`` and its one rounding. Gradients, which are turned back, go to query and key.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device, or a ``cos`` or ``sin`` that wants a gradient.
        NotImplementedError: the named backend does not serve these tensors.

    Source: Su et al., RoFormer (https://arxiv.org/abs/2104.09864), section 3.2.
    """
    require(query.is_floating_point(), "query", "be floating point", query.dtype, TypeError)
    require(query.dim() in (3, 4), "query", "be (N, Hq, D) or (B, S, Hq, D)", tuple(query.shape))
    *tokens, _, width = query.shape
    fits = key.dim() == query.dim() and [*key.shape[:-2], key.shape[-1]] == [*tokens, width]
    require(fits, "key", "have the tokens and the width of query", f"{tuple(key.shape)} for {tuple(query.shape)}")
    fits = cos.dim() == len(tokens) + 1 and 2 * cos.shape[-1] <= width
    fits = fits and all(size in (1, own) for size, own in zip(cos.shape, tokens, strict=False))
    rule = "have the tokens of query, or 1 in their place, and at most D / 2 pairs"
    require(fits, "cos", rule, f"{tuple(cos.shape)} for {tuple(query.shape)}")
    require_shape("sin", sin, cos.shape, "cos")
    require_dtype("key", key, query.dtype)
    require_dtype("cos", cos, torch.float32, torch.bfloat16, torch.float16, torch.float64)
    require_dtype("sin", sin, cos.dtype)
    for name, tensor in (("key", key), ("cos", cos), ("sin", sin)):
        require_device(name, tensor, query.device, "query")
    require(not (cos.requires_grad or sin.requires_grad), "cos and sin", "not require gradients: they get none", "some that do")
    cos, sin = (table.expand(*tokens, -1) for table in (cos, sin))
    if query.dim() == 4:
        return torch.ops.vlmkernels.rotary(query, key, cos, sin, False, resolve(backend))
    packed = (x.unsqueeze(0) for x in (query, key, cos, sin))
    query, key = torch.ops.vlmkernels.rotary(*packed, False, resolve(backend))
    return query.squeeze(0), key.squeeze(0)


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
