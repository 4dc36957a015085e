"""Packed attention by ``torch.nn.functional.scaled_dot_product_attention``: one call per run of sequences of one length."""

from itertools import groupby, pairwise

import torch
from torch.nn.functional import scaled_dot_product_attention

from vlmkernels.ops.checks import require


def unsupported(query: torch.Tensor) -> str | None:
    return None


def run(query, key, value, cu_seqlens, max_seqlen, causal, scale):
    bounds = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in pairwise(bounds)]
    sound = bounds[0] == 0 and bounds[-1] == len(query) and min(lengths, default=0) >= 0
    require(sound, "cu_seqlens", f"go from 0 to {len(query)} without a step back", bounds)
    parts, start = [], 0
    for length, group in groupby(lengths):
        size = length * len(list(group))
        if size:
            # (n, H, T, D): the windows of an image are one call.
            q, k, v = (x[start : start + size].unflatten(0, (-1, length)).transpose(1, 2) for x in (query, key, value))
            out = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=k.shape[1] != q.shape[1])
            parts.append(out.transpose(1, 2).flatten(0, 1))
        start += size
    return torch.cat(parts) if parts else torch.empty_like(query)
