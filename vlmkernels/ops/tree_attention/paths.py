"""Attention in which the result of a token depends on the tokens of its path only, bit for bit.

The queries run in tiles of ROWS tokens, and the keys of a path in blocks of KEYS tokens from the beginning of the path. The
maximum m of a query's scores does not depend on the order, and hidden keys add exactly 0:
    total = sum_b sum_j e^(s_bj - m),  out = sum_b sum_j e^(s_bj - m) v_bj / total,
with the outer sums in ascending order, so that neither padding nor other segments change a bit. Products and sums are in fp32.
"""

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import pad

from vlmkernels.ops.decode_attention.inputs import KeyValues
from vlmkernels.ops.fixed_matmul import fixed_matmul
from vlmkernels.ops.tree_attention.layout import TreeLayout

ROWS, KEYS = 16, 256


def unsupported(query: torch.Tensor, layout: TreeLayout | None = None, window: int | None = None) -> str | None:
    return None


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor, scale: float) -> torch.Tensor:
    """Compute the attention of some tokens of a path.

    Args:
        query: (n, Hq, D).
        key: (L, Hkv, D), from the beginning of the path.
        value: (L, Hkv, Dv).
        seen: (n, L) bool on the CPU, which keys each query sees.
        scale: multiplies the scores.

    Returns:
        (n, Hq, Dv), 0 for a query that sees no key.
    """
    count, heads, _ = query.shape
    length, groups = key.shape[:2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    more = -length % KEYS
    keys, values = (
        pad(x.to(dtype).transpose(0, 1), (0, 0, 0, more)).unflatten(1, (-1, KEYS)).transpose(0, 1).contiguous()
        for x in (key, value)
    )  # (blocks, Hkv, KEYS, D)
    seen = pad(seen, (0, more))
    out = torch.empty(count, heads, value.shape[-1], dtype=query.dtype, device=query.device)
    for first in range(0, count, ROWS):
        q = query[first : first + ROWS].to(dtype)
        rows = len(q)
        q = pad(q, (0, 0, 0, 0, 0, ROWS - rows)).unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(1, 2).contiguous()
        visible = pad(seen[first : first + ROWS], (0, 0, 0, ROWS - rows)).unflatten(1, (-1, KEYS))
        blocks = visible.any(2).any(0).nonzero()[:, 0].tolist()
        hidden = (~visible).to(query.device, non_blocking=True)
        scores = []
        for block in blocks:
            x = _bmm(q, keys[block].mT).mul_(scale).unflatten(1, (-1, ROWS))
            scores.append(x.masked_fill_(hidden[:, block], -torch.inf).flatten(1, 2))
        if not blocks:
            out[first : first + rows] = 0
            continue
        maximum = torch.stack([x.amax(-1) for x in scores]).amax(0)
        maximum = maximum.masked_fill(maximum == -torch.inf, 0).unsqueeze(-1)
        total, result = torch.zeros_like(maximum), torch.zeros_like(q[..., :1])
        for block, x in zip(blocks, scores, strict=True):
            share = x.sub_(maximum).exp_()
            total = total + share.sum(-1, keepdim=True)
            result = result + _bmm(share, values[block])
        result = torch.where(total > 0, result / total, 0).unflatten(1, (-1, ROWS))  # (Hkv, R, ROWS, Dv)
        out[first : first + rows] = result.permute(2, 0, 1, 3).flatten(1, 2)[:rows].to(out.dtype)
    return out


def decode(
    query: torch.Tensor,
    levels: Sequence[KeyValues],
    key: torch.Tensor,
    value: torch.Tensor,
    window: int | None,
    scale: float | None,
) -> torch.Tensor:
    """Compute ``decode_attention`` on the CPU with the bits that ``tree_attention`` returns for whole paths."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out = query.new_empty(*query.shape[:2], value.shape[-1])
    for slot in range(len(query)):
        paths: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for level in levels:
            segment = slot if level.segment is None else int(level.segment[slot])
            if segment < 0:
                continue
            length = int(level.lengths[segment])
            if level is levels[-1]:
                level.key[segment, :, length], level.value[segment, :, length] = key[slot], value[slot]
                length += 1
            for path, stored in zip(paths, (level.key, level.value), strict=True):
                path.append(stored[segment, :, :length])
        keys, values = (torch.cat(path, 1).transpose(0, 1) for path in paths)
        seen = torch.ones(1, len(keys), dtype=torch.bool)
        if window is not None:
            seen[:, : max(len(keys) - window, 0)] = False
        out[slot] = attend(query[slot : slot + 1], keys, values, seen, scale)[0]
    return out


def _bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.stack([fixed_matmul(x, y) for x, y in zip(a, b, strict=True)])


def _seen(layout: TreeLayout, segment: int, window: int | None) -> torch.Tensor:
    """Return which tokens of its path each token of a segment sees, (length, offset + length) bool."""
    start, offset, length = layout.starts[segment], layout.offsets[segment], layout.lengths[segment]
    position = torch.arange(offset + length)
    query = position[offset:].unsqueeze(1)
    seen = position <= query
    block = layout.tokens[1, start : start + length]
    seen[:, offset:] |= (block.unsqueeze(1) == block) & (block >= 0)
    if window is not None:
        seen &= query - position < window
    return seen


class Recomputed(torch.autograd.Function):
    """``forward(*tensors)``, with the gradients of ``other(*tensors)``, which computes the same up to rounding."""

    @staticmethod
    def forward(ctx, forward: Callable, other: Callable, *tensors):
        ctx.other = other
        ctx.save_for_backward(*tensors)
        return forward(*tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        with torch.enable_grad():
            tensors = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            out = ctx.other(*tensors)
        return None, None, *torch.autograd.grad(out, tensors, dout)


def run(query, key, value, layout, window, scale):
    from vlmkernels.ops.tree_attention import tree_attention  # for the gradients

    def forward(query, key, value):
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        for segment, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
            if length:
                path = torch.cat(
                    [torch.arange(layout.starts[s], layout.starts[s] + layout.lengths[s]) for s in layout.path(segment)]
                )
                path = path.to(query.device, non_blocking=True)
                stop = start + length
                out[start:stop] = attend(query[start:stop], key[path], value[path], _seen(layout, segment, window), scale)
        return out

    def other(query, key, value):
        return tree_attention(query, key, value, layout, window=window, scale=scale)

    return Recomputed.apply(forward, other, query, key, value)
