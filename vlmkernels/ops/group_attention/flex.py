"""Group attention by FlexAttention: the layout becomes a block mask, and one compiled kernel serves all layouts.

https://pytorch.org/docs/stable/nn.attention.flex_attention.html
"""

from functools import cache, lru_cache

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
PARTIAL, FULL = 1, 2


def unsupported(query: torch.Tensor) -> str | None:
    if query.device.type == "cpu" and query.requires_grad and torch.is_grad_enabled():
        return "FlexAttention has no backward pass on the CPU"
    if query.device.type == "cuda" and query.shape[-1] < 16:
        return f"FlexAttention supports head dimensions of at least 16 on CUDA, got {query.shape[-1]}"
    return None


@cache
def _compiled():
    # fullgraph raises at the recompile limit. Without it FlexAttention would then run eagerly, over all pairs of tokens.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _block_kinds(layout) -> torch.Tensor:
    """Return (blocks, blocks) int8 on the CPU: whether a block of queries sees a block of keys.

    FULL: every query sees every key; 0: no query sees any key; PARTIAL: otherwise. It is computed from the lengths, without the
    (N, N) mask.
    """
    num = layout.num_tokens
    blocks = -(-num // BLOCK)
    seen, full = torch.zeros(blocks, blocks, dtype=torch.bool), torch.ones(blocks, blocks, dtype=torch.bool)
    full[num // BLOCK :] = False  # the last block, if it is incomplete

    def touched(start: int, stop: int) -> slice:
        """The blocks that overlap [start, stop)."""
        return slice(start // BLOCK, -(-stop // BLOCK))

    def covered(start: int, stop: int) -> slice:
        """The blocks within [start, stop)."""
        return slice(-(-start // BLOCK), max(stop // BLOCK, -(-start // BLOCK)))

    start = 0
    for (begin, first, _), completions in zip(layout.groups, layout.completions, strict=True):
        for length in (first - begin, *completions):
            stop = start + length
            origin = begin if start <= first else start  # the prefix and the first completion are one range
            # Split the segment at the ends of blocks. Later rows of a piece see everything that its first row sees.
            for low in (start, *range(start - start % BLOCK + BLOCK, stop, BLOCK)) if length else ():
                row, high = low // BLOCK, min(stop, low - low % BLOCK + BLOCK)
                whole = torch.zeros(blocks, dtype=torch.bool)
                seen[row, touched(origin, high)] = True
                whole[covered(origin, low + 1)] = True
                if origin > begin:
                    seen[row, touched(begin, first)] = True
                    whole[covered(begin, first)] = True
                full[row] &= whole
            start = stop
    return seen.to(torch.int8) * PARTIAL + (seen & full)


def _block_mask_of(kinds: torch.Tensor, mask_mod, num: int) -> BlockMask:
    def ordered(kind: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return, for each row, the number of blocks of this kind, and the indices of all blocks, those of this kind first."""
        chosen = (kinds == kind)[None, None].to(torch.int32)
        return chosen.sum(-1, dtype=torch.int32), chosen.argsort(dim=-1, descending=True, stable=True).to(torch.int32)

    return BlockMask.from_kv_blocks(
        *ordered(PARTIAL), *ordered(FULL), BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(num, num)
    )


@lru_cache(maxsize=4)  # all layers of a pass have the same layout
@torch.inference_mode(False)  # a later pass may save the mask for its backward pass
def _block_mask(layout, device: torch.device) -> BlockMask:
    def upload(x: torch.Tensor) -> torch.Tensor:
        return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)

    group, segment = (upload(x.clone()) for x in layout.tokens)  # clones: a view would be compiled for its base

    def sees(b, h, i, j):
        own = (segment[i] == segment[j]) | (segment[j] == 0)
        return (group[i] == group[j]) & own & (j <= i)

    return _block_mask_of(upload(_block_kinds(layout)), sees, layout.num_tokens)


def run(query, key, value, layout, scale):
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    options = {"scale": scale, "enable_gqa": k.shape[1] != q.shape[1], "block_mask": _block_mask(layout, query.device)}
    if query.device.type == "cuda":
        # For short packs FlexAttention would select its decoding kernel, which does not support all head dimensions in fp32.
        out = _compiled()(q, k, v, kernel_options={"FORCE_USE_FLEX_ATTENTION": True}, **options)
    else:
        out = flex_attention(q, k, v, **options)
    return out.squeeze(0).transpose(0, 1)
