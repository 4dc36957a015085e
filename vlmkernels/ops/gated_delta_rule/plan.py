"""Division of a pack of trees into chunks of tokens, and the order in which their states are computed.

A segment is cut into chunks of the largest size; the rest of it is a chunk of the smallest size that holds it. Chunks form
trees as segments do: the predecessor of a chunk is the chunk before it on its path. All chunks with the same number of
predecessors are a wave: they start from states of the wave before, and are computed together.
"""

from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch

from vlmkernels.ops.tree_attention.layout import TreeLayout

Rows = slice | torch.Tensor  # a slice if the rows are neighbors, else (n,) int64


class Group(NamedTuple):
    """The n chunks of one wave and one size, of up to C tokens.

    Attributes:
        size: C.
        key_rows: (n * Hk * C,) the rows of the pack, viewed as (N * Hk, ...), of (n, Hk, C, ...). Where a chunk has fewer than
            C tokens, its last token is repeated.
        value_rows: (n * Hv * C,) the same for Hv heads.
        padding: the places of the repetitions among ``value_rows``.
        keys, values: the places of its ``key_rows`` and ``value_rows`` among those of all groups.
        states: its states among those of its wave.
        sources: the states that its chunks start from, among those of the wave before.
        is_last: whether no chunk starts from its states.
    """

    size: int
    key_rows: torch.Tensor
    value_rows: torch.Tensor
    padding: torch.Tensor
    keys: slice
    values: slice
    states: slice
    sources: Rows
    is_last: bool


class Ends(NamedTuple):
    """The segments whose final states are in one wave: their indices, and the rows of their states."""

    segments: Rows
    states: Rows


class Plan(NamedTuple):
    """The chunks of a layout.

    Attributes:
        waves: the groups of each wave. The states before the first wave are those of the roots.
        ends: for the states before the first wave and for those of each wave, the segments that end there; None if none does.
        key_rows, value_rows: for each row of the pack, viewed as (N * H, ...), its place among the rows of all groups.
        num_segments: the number of segments of the layout.
    """

    waves: tuple[tuple[Group, ...], ...]
    ends: tuple[Ends | None, ...]
    key_rows: torch.Tensor
    value_rows: torch.Tensor
    num_segments: int


class Chunk(NamedTuple):
    """A chunk; the order of chunks is that of the groups."""

    wave: int
    size: int
    index: int  # in the order of the pack
    start: int
    length: int
    source: int  # the index of its predecessor, or -1 - root


def chunks(layout: TreeLayout, sizes: tuple[int, ...]) -> tuple[list[Chunk], list[int]]:
    """Return the chunks, and for each segment the last chunk of its path or -1 - root."""
    result: list[Chunk] = []
    ends: list[int] = []
    roots = 0
    for start, length, parent in zip(layout.starts, layout.lengths, layout.parents, strict=True):
        source = ends[parent] if parent >= 0 else -1 - roots
        roots += parent < 0
        for first in range(start, start + length, sizes[-1]):
            count = min(start + length - first, sizes[-1])
            wave = result[source].wave + 1 if source >= 0 else 0
            result.append(Chunk(wave, next(x for x in sizes if x >= count), len(result), first, count, source))
            source = len(result) - 1
        ends.append(source)
    return result, ends


@lru_cache(maxsize=4)  # all layers of a pass have the same layout; a plan has indices for each head of each token
@torch.inference_mode(False)  # a plan that is first used for inference also serves training
def plan(layout: TreeLayout, key_heads: int, value_heads: int, sizes: tuple[int, ...], device: torch.device) -> Plan:
    """Return the plan of a layout that has a token, with chunks of these sizes, ascending."""
    all_chunks, ends = chunks(layout, sizes)
    continued = {chunk.source for chunk in all_chunks}
    states = {-1 - root: root for root in range(layout.parents.count(-1))}  # by chunk, its state among those of its wave
    waves: list[tuple[Group, ...]] = []
    keys, values = [], []
    before = 0
    for _, in_wave in groupby(sorted(all_chunks), key=lambda x: x.wave):
        groups: list[Group] = []
        count = 0
        for size, of_size in groupby(in_wave, key=lambda x: x.size):
            members = list(of_size)
            states.update((x.index, count + i) for i, x in enumerate(members))
            start, length = (torch.tensor([getattr(x, name) for x in members])[:, None, None] for name in ("start", "length"))
            place = torch.arange(size)
            tokens = start + torch.minimum(place, length - 1)  # (n, 1, C)
            key_rows, value_rows = ((tokens * n + torch.arange(n)[:, None]).flatten() for n in (key_heads, value_heads))
            padding = (place >= length).expand(-1, value_heads, -1).flatten().nonzero().squeeze(1)
            keys.append(key_rows)
            values.append(value_rows)
            groups.append(
                Group(
                    size,
                    *(upload(x, device) for x in (key_rows, value_rows, padding)),
                    *(slice(before * n, (before + size * len(members)) * n) for n in (key_heads, value_heads)),
                    slice(count, count + len(members)),
                    rows([states[x.source] for x in members], device),
                    not any(x.index in continued for x in members),
                )
            )
            count += len(members)
            before += size * len(members)
        waves.append(tuple(groups))
    places = (upload(_inverse(torch.cat(x)), device) for x in (keys, values))
    return Plan(tuple(waves), _ends(ends, all_chunks, states, device), *places, len(ends))


def _ends(lasts: list[int], chunks: list[Chunk], states: dict[int, int], device: torch.device) -> tuple[Ends | None, ...]:
    by_wave: list[list[int]] = [[] for _ in range(max(x.wave for x in chunks) + 2)]
    for segment, last in enumerate(lasts):
        by_wave[chunks[last].wave + 1 if last >= 0 else 0].append(segment)
    return tuple(Ends(rows(x, device), rows([states[lasts[s]] for s in x], device)) if x else None for x in by_wave)


def rows(indices: list[int], device: torch.device) -> Rows:
    """Return the indices as a slice if they are neighbors, else on the device."""
    if indices == list(range(indices[0], indices[0] + len(indices))):
        return slice(indices[0], indices[0] + len(indices))
    return upload(torch.tensor(indices), device)


def _inverse(rows: torch.Tensor) -> torch.Tensor:
    """Return for 0, 1, ... the first place in ``rows``, which is not a repetition."""
    places = torch.full((int(rows.max()) + 1,), len(rows))
    return places.scatter_reduce(0, rows, torch.arange(len(rows)), "amin")


def upload(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to the device without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
