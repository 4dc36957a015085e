"""Packed attention by ``torch.nn.functional.scaled_dot_product_attention``: one call for all sequences of one length."""

import torch
from torch.nn.functional import scaled_dot_product_attention


def unsupported(query: torch.Tensor) -> str | None:
    return None


def empty_result(query, key, value):
    """Return the empty result for no tokens, as a function of all three inputs: their gradients are empty tensors, not None."""
    return query + (key.sum() + value.sum())


def run(query, key, value, cu_seqlens, max_seqlen, causal, scale):
    bounds = cu_seqlens.long().cpu()
    lengths = bounds.diff()
    if bounds[0] != 0 or bounds[-1] != len(query) or (lengths < 0).any():
        raise ValueError(f"cu_seqlens must go from 0 to {len(query)} without a step back, got {bounds.tolist()}")
    if not len(query):
        return empty_result(query, key, value)
    used = lengths[lengths > 0]
    sizes, counts = used.unique_consecutive(return_counts=True)
    order = None
    if len(sizes.unique()) < len(sizes):
        # Sort sequences by length: all full windows of all images become one call, and so do their edges of each size.
        order = lengths.repeat_interleave(lengths).argsort(stable=True).to(query.device)
        query, key, value = (x.index_select(0, order) for x in (query, key, value))
        sizes, counts = used.unique(return_counts=True)
    parts = []
    for length, *inputs in zip(sizes.tolist(), *(x.split((sizes * counts).tolist()) for x in (query, key, value)), strict=True):
        q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in inputs)  # (n, H, T, D)
        out = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=k.shape[1] != q.shape[1])
        parts.append(out.transpose(1, 2).flatten(0, 1))
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out if order is None else torch.empty_like(out).index_copy(0, order, out)
