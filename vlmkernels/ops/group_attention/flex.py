"""Group attention by FlexAttention: the layout as a mask over blocks, compiled once for all layouts.

https://pytorch.org/docs/stable/nn.attention.flex_attention.html
"""

from functools import cache

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


def unsupported(query: torch.Tensor) -> str | None:
    if query.device.type == "cpu" and query.requires_grad and torch.is_grad_enabled():
        return "FlexAttention has no backward pass on the CPU"
    return None


@cache
def _compiled():
    return torch.compile(flex_attention, dynamic=True)


_masks: dict = {}  # of the layout in use: every layer of a forward pass asks for the same one


def _block_mask(layout, device: torch.device):
    if (layout, device) not in _masks:
        _masks.clear()
        group, segment = layout.tokens.to(device)

        def sees(b, h, i, j):
            own = (segment[i] == segment[j]) | (segment[j] == 0)
            return (group[i] == group[j]) & own & (j <= i)

        num = layout.num_tokens
        _masks[layout, device] = create_block_mask(sees, None, None, num, num, device=device)
    return _masks[layout, device]


def run(query, key, value, layout, scale):
    if not len(query):
        return query.clone()
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    attention = _compiled() if query.device.type == "cuda" else flex_attention
    out = attention(q, k, v, block_mask=_block_mask(layout, query.device), scale=scale, enable_gqa=k.shape[1] != q.shape[1])
    return out.squeeze(0).transpose(0, 1)
