"""Rotation of pairs of features by angles in plain PyTorch: the oracle of ``rotary``.

Pair j of the P pairs of a head is (x_j, x_{j+P}):  y_j = x_j cos_j - x_{j+P} sin_j,  y_{j+P} = x_{j+P} cos_j + x_j sin_j.
The inverse rotates by -angle, and is also the gradient. Features from 2 P on are copied. https://arxiv.org/abs/2104.09864,
section 3.2.
"""

import torch


def unsupported(*tensors: torch.Tensor) -> str | None:
    return None


def _rotate(x, cos, sin, out):
    pairs = cos.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (t.to(dtype).unsqueeze(-2) for t in (cos, sin))
    first, second, rest = x.to(dtype).split([pairs, pairs, x.shape[-1] - 2 * pairs], -1)
    out.copy_(torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1))


def fwd(query, key, cos, sin, inverse, heads_first, query_out, key_out):
    """Write the results. query, key, results: (..., S, H, D), or (..., H, S, D) with heads_first; cos, sin: (..., S, P)."""
    heads = (query, key, query_out, key_out)
    query, key, query_out, key_out = (x.transpose(-3, -2) for x in heads) if heads_first else heads
    sin = -sin if inverse else sin
    _rotate(query, cos, sin, query_out)
    _rotate(key, cos, sin, key_out)
