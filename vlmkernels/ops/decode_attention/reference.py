"""Attention of one query per slot over the path of its segments in plain PyTorch: the oracle of ``decode_attention``.

For slot s and head h, with the keys k_j and values v_j of its path, the last ``window`` of them:
o = sum_j p_j v_j,  p_j = exp(scale q . k_j - lse),  lse = log sum_j exp(scale q . k_j). Without any key, o = 0 and lse = -inf.
https://arxiv.org/abs/1706.03762, section 3.2.1; https://arxiv.org/abs/1911.02150 (heads that share keys and values).

It copies the keys of a path for every slot, and waits for the device to append the new tokens.
"""

import torch


def unsupported(*tensors: torch.Tensor) -> str | None:
    return None


def _segments(level, slots):
    """The segment of each slot, and whether it is one of those that exist."""
    segment = torch.arange(slots, device=level.key.device) if level.segment is None else level.segment.long()
    return segment, (segment >= 0) & (segment < level.num_segments)


def _positions(level, segment, place):
    """Where tokens ``place`` of segments are: the indices of axis 0 and 2 of the buffers."""
    if level.block_table is None:
        return segment, place
    page_size = level.key.shape[2]
    return level.block_table[segment, place // page_size].long(), place % page_size


def _append(level, key, value):
    segment, exists = _segments(level, len(key))
    length = level.lengths[segment.clamp(0, max(level.num_segments - 1, 0))].long()
    slots = (exists & (length >= 0) & (length < level.capacity)).nonzero()[:, 0]
    rows, columns = _positions(level, segment[slots], length[slots])
    level.key[rows, :, columns] = key[slots]
    level.value[rows, :, columns] = value[slots]


def _read(level, slots, new):
    """Keys and values (S, Hkv, L, D) that the slots read, how many of them, and whether that is possible."""
    segment, exists = _segments(level, slots)
    fits = exists | (segment == -1)
    if not level.num_segments:
        return *(x.new_zeros(slots, x.shape[1], 0, x.shape[3]) for x in (level.key, level.value)), segment * 0, fits
    segment = torch.where(exists, segment, 0)
    length = torch.where(exists, level.lengths[segment].long() + new, 0)
    fits &= (length >= new * exists) & (length <= level.capacity)
    place = torch.arange(level.capacity, device=length.device).expand(slots, -1)
    held = place < length.unsqueeze(1)
    rows, columns = _positions(level, segment.unsqueeze(1).expand_as(place), place)
    # Memory beyond the length holds anything, also page numbers.
    rows = torch.where(held, rows, 0)
    if len(level.key):
        fits &= ((rows >= 0) & (rows < len(level.key))).all(1)
        rows = rows.clamp(0, len(level.key) - 1)
    key, value = (x[rows, :, columns].transpose(1, 2).masked_fill(~held[:, None, :, None], 0) for x in (level.key, level.value))
    return key, value, length, fits


def fwd(query, key, value, levels, window, scale, out, lse):
    """Append key and value, and write out (S, Hq, Dv) and lse (S, Hq)."""
    slots, dtype = len(query), lse.dtype
    if key is not None:
        _append(levels[-1], key, value)
    keys, values, places, seen = [], [], [], []
    fits = torch.ones(slots, dtype=torch.bool, device=query.device)
    before = torch.zeros(slots, dtype=torch.int64, device=query.device)  # the number of tokens on the path so far
    for level in levels:
        k, v, length, fit = _read(level, slots, int(key is not None and level is levels[-1]))
        place = torch.arange(k.shape[2], device=query.device)
        keys.append(k.to(dtype))
        values.append(v.to(dtype))
        places.append(before.unsqueeze(1) + place)
        seen.append(place < length.unsqueeze(1))
        before, fits = before + length, fits & fit
    mask = torch.cat(seen, 1)
    if window is not None:
        mask &= torch.cat(places, 1) >= before.unsqueeze(1) - window
    q = query.to(dtype).unflatten(1, (keys[0].shape[1], -1))
    scores = torch.einsum("shrd,shld->shrl", q, torch.cat(keys, 2)) * scale
    scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    total = scores.logsumexp(-1, keepdim=True)
    shares = (scores - total.masked_fill(total == -torch.inf, 0)).exp()
    result = torch.einsum("shrl,shld->shrd", shares, torch.cat(values, 2)).flatten(1, 2)
    out.copy_(result.masked_fill(~fits[:, None, None], torch.nan))
    lse.copy_(total.flatten(1).masked_fill(~fits[:, None], torch.nan))
