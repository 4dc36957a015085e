"""The buffers that ``decode_attention`` reads, and the checks of their shapes and values."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from vlmkernels.ops.arguments import as_indices
from vlmkernels.ops.checks import require_device, require_dtype, require_shape, require_tensor

MAX_PARTS = 32  # of a segment
MAX_LEVELS = 8  # kDecodeMaxLevels of csrc/common/decode_attention.h


class KeyValues(NamedTuple):
    """Keys and values of one level of a tree of segments. A slot reads at most one segment of each level.

    Args:
        key: (N, Hkv, L, D). With block_table: (pages, Hkv, page_size, D).
        value: (N, Hkv, L, Dv). With block_table: (pages, Hkv, page_size, Dv). Dv may differ from D. The last axis of key and
            value is contiguous; the others may have any stride, so parts of larger buffers are not copied.
        lengths: (N,) int32, on the device: the number of tokens that each segment holds.
        segment: (S,) int32, on the device: the segment that each slot reads, -1 for none. None: slot s reads segment s.
        block_table: (N, max_pages) int32, on the device: token j of segment n is token j % page_size of page
            block_table[n, j // page_size]. Entries beyond the length of a segment are not read.
        order: (S,) int32, the slots sorted by segment. See ``grouped``.
        rank: (S,) int32: order[i] is the rank[i]-th slot of its segment, from 0; -1 if it reads none.
    """

    key: torch.Tensor
    value: torch.Tensor
    lengths: torch.Tensor
    segment: torch.Tensor | None = None
    block_table: torch.Tensor | None = None
    order: torch.Tensor | None = None
    rank: torch.Tensor | None = None

    @property
    def num_segments(self) -> int:
        """N."""
        return (self.key if self.block_table is None else self.block_table).shape[0]

    @property
    def capacity(self) -> int:
        """The number of tokens for which a segment has memory."""
        return self.key.shape[2] * (1 if self.block_table is None else self.block_table.shape[1])

    def grouped(self) -> "KeyValues":
        """Return the level with ``order`` and ``rank``.

        They depend only on ``segment``: compute them once per step, not in every layer. Without them, ``decode_attention``
        computes them itself where a backend needs them. This does not wait for the device.
        """
        if self.segment is None or self.order is not None:
            return self
        ordered, order = self.segment.sort(stable=True)
        rank = torch.arange(len(order), device=order.device) - torch.searchsorted(ordered, ordered)
        exists = (ordered >= 0) & (ordered < self.num_segments)
        return self._replace(order=order.int(), rank=torch.where(exists, rank, -1).int())


def part_size(level: KeyValues, blocks: int = 0, least: int = 512) -> int:
    """Return the number of tokens of the parts into which kernels split the segments of a level.

    It depends only on the shape of the buffers, so that the result of a slot depends neither on what they hold nor on the other
    slots.

    Args:
        blocks: the parts of all segments and key heads that fill a GPU. Segments are not split further, because the results of
            every part cost memory traffic. Default: parts have ``least`` tokens.
        least: a multiple of 64.
    """
    parts = -(-blocks // max(level.num_segments * level.key.shape[1], 1)) if blocks else MAX_PARTS
    return max(least, -(-level.capacity // (min(parts, MAX_PARTS) * 64)) * 64)


def as_level(index: int, level: KeyValues, query: torch.Tensor, like: KeyValues | None) -> KeyValues:
    """Check types, dtypes, shapes and devices of a level, and return it with integers as int32.

    Args:
        index: its place among the levels.
        like: the first level, whose heads the others have; None for the first level itself.
    """
    name = f"levels[{index}]"
    if not isinstance(level, KeyValues):
        raise TypeError(f"{name} must be KeyValues, got {type(level).__name__}")
    slots, heads, width = query.shape
    key, value = level.key, level.value
    for field, x in (("key", key), ("value", value)):
        require_tensor(f"{name}.{field}", x)
        require_dtype(f"{name}.{field}", x, query.dtype)
        require_device(f"{name}.{field}", x, query.device, "query")
    paged = level.block_table is not None
    if key.dim() != 4 or key.shape[3] != width or not key.shape[1] or heads % key.shape[1]:
        shape = "(pages, Hkv, page_size, D)" if paged else "(N, Hkv, L, D)"
        raise ValueError(f"{name}.key must be {shape} with D = {width} and Hkv a divisor of {heads}, got {tuple(key.shape)}")
    if value.dim() != 4 or value.shape[:3] != key.shape[:3] or not value.shape[3]:
        raise ValueError(f"{name}.value must be (*{tuple(key.shape[:3])}, Dv), as its key, got {tuple(value.shape)}")
    if like is not None and (key.shape[1], value.shape[3]) != (like.key.shape[1], like.value.shape[3]):
        raise ValueError(
            f"{name} must have the heads and the width of the values of levels[0], {like.key.shape[1]} and"
            f" {like.value.shape[3]}, got {key.shape[1]} and {value.shape[3]}"
        )
    if paged:
        table = as_indices(f"{name}.block_table", level.block_table, torch.int32, query.device)
        if table.dim() != 2 or (table.shape[1] and not key.shape[2]):
            raise ValueError(
                f"{name}.block_table must be (N, max_pages) with pages of at least 1 token, got {tuple(table.shape)}"
            )
        require_device(f"{name}.block_table", table, query.device, "query")
        level = level._replace(block_table=table)
    num = level.num_segments
    lengths = as_indices(f"{name}.lengths", level.lengths, torch.int32, query.device)
    require_shape(f"{name}.lengths", lengths, (num,), "its segments")
    require_device(f"{name}.lengths", lengths, query.device, "query")
    if level.segment is None:
        if num < slots:
            raise ValueError(f"{name} must have a segment for every slot or name those that slots read, got {num} for {slots}")
        return level._replace(lengths=lengths, order=None, rank=None)
    segment = as_indices(f"{name}.segment", level.segment, torch.int32, query.device)
    require_shape(f"{name}.segment", segment, (slots,), "the slots of query")
    require_device(f"{name}.segment", segment, query.device, "query")
    if (level.order is None) != (level.rank is None):
        raise ValueError(f"{name}.order and {name}.rank must be given together, see grouped()")
    for field, x in (("order", level.order), ("rank", level.rank)):
        if x is not None:
            require_dtype(f"{name}.{field}", x, torch.int32)
            require_shape(f"{name}.{field}", x, (slots,), "the slots of query")
            require_device(f"{name}.{field}", x, query.device, "query")
            level = level._replace(**{field: x.contiguous()})  # kernels read them without a stride
    return level._replace(lengths=lengths, segment=segment)


def require_values(levels: Sequence[KeyValues], slots: int, appends: bool) -> None:
    """Check the values of CPU tensors: segments, lengths and pages are within the buffers, and there is room to append."""
    for index, level in enumerate(levels):
        name, num, capacity = f"levels[{index}]", level.num_segments, level.capacity
        lengths = level.lengths.tolist()
        if lengths and (min(lengths) < 0 or max(lengths) > capacity):
            n = next(n for n, length in enumerate(lengths) if not 0 <= length <= capacity)
            raise ValueError(f"{name}.lengths must be in [0, {capacity}], the capacity of a segment, got {lengths[n]} at {n}")
        if level.segment is None:
            segments: Sequence[int] = range(slots)  # as_level checks that there are as many segments
        else:
            segments = level.segment.tolist()
            if segments and (min(segments) < -1 or max(segments) >= num):
                s = next(s for s, segment in enumerate(segments) if not -1 <= segment < num)
                raise ValueError(f"{name}.segment must be in [0, {num}), or -1 for none, got {segments[s]} for slot {s}")
        paged = level.block_table is not None
        # Mostly slot s appends to segment s, and one comparison is enough.
        check = level.segment is not None or paged or max(lengths[:slots], default=0) >= capacity
        if appends and index == len(levels) - 1 and check:
            _require_room(name, segments, lengths, capacity)
        if paged:
            _require_pages(name, level, lengths)


def _require_room(name: str, segments: Sequence[int], lengths: list[int], capacity: int) -> None:
    """Check that slots can append a token to their segments, and count it in ``lengths``."""
    owners: dict[int, int] = {}
    for s, n in enumerate(segments):
        if n < 0:
            continue
        if owners.setdefault(n, s) != s:
            raise ValueError(
                f"{name}.segment must be a different one for every slot, which appends to it,"
                f" got {n} for slots {owners[n]} and {s}"
            )
        if lengths[n] >= capacity:
            raise ValueError(f"{name}.lengths must leave room for a new token, below {capacity}, got {lengths[n]} at {n}")
        lengths[n] += 1


def _require_pages(name: str, level: KeyValues, lengths: list[int]) -> None:
    table, pages, page_size = level.block_table, *level.key.shape[:3:2]
    assert table is not None
    used = torch.arange(table.shape[1]) * page_size < torch.tensor(lengths).unsqueeze(1)
    bad = used & ((table < 0) | (table >= pages))
    if bad.any():
        n, k = bad.nonzero()[0].tolist()
        raise ValueError(f"{name}.block_table must be in [0, {pages}), the pages, got {table[n, k].item()} at ({n}, {k})")
