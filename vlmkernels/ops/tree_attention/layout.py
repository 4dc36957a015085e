"""The layout of a pack of trees of segments, and its attention mask."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from operator import index

import torch


@dataclass(frozen=True)
class TreeLayout:
    """The segments of a pack, on the host: trees whose paths from the root are sequences that share their beginnings.

    Segments are in depth-first order: after each segment come its descendants. A token sees the tokens of its path up to
    itself: those of the ancestors of its segment and the earlier ones of its own segment. Tokens of a span in
    ``bidirectional`` also see the later tokens of their span, and with ``linked`` those of all spans of their segment.

    Args:
        lengths: the number of tokens of each segment; >= 0.
        parents: for each segment the index of the segment that it continues, or -1 for the root of a tree.
        bidirectional: (start, stop) of each bidirectional span, in tokens of the pack, ascending; each within one segment.
        linked: whether the bidirectional spans of a segment attend to each other too.

    Raises:
        ValueError: a length is negative, the parents are not those of trees in depth-first order, or a span is not within
            a segment.
        TypeError: a number is no integer.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    bidirectional: tuple[tuple[int, int], ...] = ()
    linked: bool = False

    def __post_init__(self) -> None:
        for name in ("lengths", "parents"):
            object.__setattr__(self, name, tuple(map(index, getattr(self, name))))
        object.__setattr__(self, "bidirectional", tuple((index(a), index(b)) for a, b in self.bidirectional))
        if len(self.parents) != len(self.lengths):
            raise ValueError(f"parents must be one per segment, {len(self.lengths)}, got {len(self.parents)}")
        for segment, length in enumerate(self.lengths):
            if length < 0:
                raise ValueError(f"lengths must be >= 0, got {length} for segment {segment}")
        _check_depth_first(self.parents)
        _check_spans(self.bidirectional, self.starts, self.lengths)

    @classmethod
    def groups(cls, prefixes: Sequence[int], completions: Sequence[Sequence[int]]) -> "TreeLayout":
        """Return the layout [prefix | c1 | ... | cG] of groups of completions, one group after another.

        Args:
            prefixes: for each group, the number of tokens of its prefix.
            completions: for each group, the number of tokens of each of its completions.

        Raises:
            ValueError: the two are not of the same number of groups, or a length is negative.
        """
        if len(prefixes) != len(completions):
            raise ValueError(f"completions must be of {len(prefixes)} groups, got {len(completions)}")
        lengths: list[int] = []
        parents: list[int] = []
        for prefix, group in zip(prefixes, completions, strict=True):
            parents += [-1, *[len(parents)] * len(group)]
            lengths += [prefix, *group]
        return cls(tuple(lengths), tuple(parents))

    @cached_property
    def num_tokens(self) -> int:
        """The number of tokens of the pack."""
        return sum(self.lengths)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The index in the pack of the first token of each segment."""
        return tuple(accumulate(self.lengths, initial=0))[:-1]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """The number of tokens of the path before each segment: the sum of the lengths of its ancestors."""
        offsets: list[int] = []
        for parent in self.parents:
            offsets.append(offsets[parent] + self.lengths[parent] if parent >= 0 else 0)
        return tuple(offsets)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """The number of ancestors of each segment."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        return tuple(depths)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The index in the pack of the token after the last descendant of each segment."""
        ends = [start + length for start, length in zip(self.starts, self.lengths, strict=True)]
        for segment in reversed(range(len(ends))):
            if (parent := self.parents[segment]) >= 0:
                ends[parent] = max(ends[parent], ends[segment])
        return tuple(ends)

    @cached_property
    def num_paths(self) -> tuple[int, ...]:
        """The number of paths that contain each segment: the leaves among its descendants, 1 for a leaf itself."""
        paths = [0] * len(self.parents)
        for segment in reversed(range(len(paths))):
            paths[segment] = paths[segment] or 1
            if (parent := self.parents[segment]) >= 0:
                paths[parent] += paths[segment]
        return tuple(paths)

    @cached_property
    def longest_path(self) -> int:
        """The number of tokens of the longest path."""
        return max((o + n for o, n in zip(self.offsets, self.lengths, strict=True)), default=0)

    def path(self, segment: int) -> tuple[int, ...]:
        """Return the segments from the root to ``segment``, which is the last."""
        path = []
        while segment >= 0:
            path.append(segment)
            segment = self.parents[segment]
        return tuple(reversed(path))

    def per_token(self, values: Sequence[int]) -> torch.Tensor:
        """Return the value of each token's segment: (N,) int64 on the CPU."""
        return torch.tensor(values, dtype=torch.int64).repeat_interleave(torch.tensor(self.lengths, dtype=torch.int64))

    @cached_property
    def tokens(self) -> torch.Tensor:
        """(3, N) int32 on the CPU, which define the attention: token i sees token j if

            ((j <= i and i < end[j]) or block[i] == block[j] != -1) and position[i] - position[j] < window

        Row 0, ``end``: the end of the descendants of token j's segment. Row 1, ``block``: equal for tokens that attend to each
        other in both directions, -1 for others. Row 2, ``position``: the index of the token in its path.
        """
        position = torch.arange(self.num_tokens)
        position += self.per_token([o - s for o, s in zip(self.offsets, self.starts, strict=True)])
        block = torch.full_like(position, -1)
        for number, spans in enumerate(self.blocks):
            for start, stop in spans:
                block[start:stop] = number
        return torch.stack([self.per_token(self.ends), block, position]).to(torch.int32)

    def mask(self, window: int | None = None) -> torch.Tensor:
        """Return (N, N) bool, whether token i sees token j. It defines the attention; use it only for small packs.

        Args:
            window: a token does not see tokens of its path that are ``window`` or more tokens before it. None: no limit.
        """
        end, block, position = self.tokens
        index = torch.arange(self.num_tokens)
        mask: torch.Tensor = (index <= index[:, None]) & (index[:, None] < end)
        mask |= (block[:, None] == block) & (block >= 0)
        return mask if window is None else mask & (position[:, None] - position < window)

    def num_pairs(self, window: int | None = None) -> int:
        """Return the number of pairs of a token and a token that it sees."""
        limit = self.num_tokens if window is None else window
        pairs = 0
        for length, offset in zip(self.lengths, self.offsets, strict=True):
            short = min(max(limit - offset, 0), length)  # the first tokens, which see their whole path
            pairs += short * offset + short * (short + 1) // 2 + (length - short) * limit
        sizes = [sum(stop - start for start, stop in spans) for spans in self.blocks]
        return pairs + sum(size * (size - 1) // 2 for size in sizes)

    @cached_property
    def blocks(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """The tokens that attend to each other in both directions, as (start, stop) of the spans of each block."""
        owners = self.per_token(range(len(self.lengths))).tolist() if self.linked else []
        blocks: dict[int, list[tuple[int, int]]] = {}
        for number, (start, stop) in enumerate(self.bidirectional):
            blocks.setdefault(owners[start] if self.linked else number, []).append((start, stop))
        return tuple(map(tuple, blocks.values()))

    @cached_property
    def condensed(self) -> "TreeLayout":
        """A layout with the same mask, in which empty segments are left out and only children are joined to their parents.

        A layout with linked spans stays as it is, because spans are linked by segments.
        """
        if self.linked:
            return self
        children = [0] * len(self.parents)  # those with tokens in their subtree
        for segment, parent in enumerate(self.parents):
            if parent >= 0:
                children[parent] += self.ends[segment] > self.starts[segment]
        lengths: list[int] = []
        parents: list[int] = []
        place = {-1: -1}  # where the tokens of a segment are, or for an empty one those before it
        ends_place = {-1: False}  # whether the place ends with the tokens of the segment
        for segment, (length, parent) in enumerate(zip(self.lengths, self.parents, strict=True)):
            place[segment], ends_place[segment] = place[parent], False
            if ends_place[parent] and children[parent] == 1 and self.ends[segment] > self.starts[segment]:
                lengths[place[segment]] += length
                ends_place[segment] = True
            elif length:
                place[segment], ends_place[segment] = len(lengths), True
                lengths.append(length)
                parents.append(place[parent])
        return TreeLayout(tuple(lengths), tuple(parents), self.bidirectional)

    def causal(self) -> "TreeLayout":
        """Return the layout without bidirectional spans."""
        return self if not self.bidirectional else self._causal

    @cached_property
    def _causal(self) -> "TreeLayout":
        return replace(self, bidirectional=(), linked=False)


def _check_depth_first(parents: Sequence[int]) -> None:
    path: list[int] = []  # the segments that the next one may continue
    for segment, parent in enumerate(parents):
        if not -1 <= parent < segment:
            raise ValueError(f"parents must be -1 or an earlier segment, got {parent} for segment {segment}")
        while path and path[-1] != parent:
            path.pop()
        if parent >= 0 and not path:
            raise ValueError(
                "parents must be in depth-first order, each segment followed by its descendants; "
                f"got {parent} for segment {segment}, after a segment that does not descend from {parent}"
            )
        path.append(segment)


def _check_spans(spans: Sequence[tuple[int, int]], starts: Sequence[int], lengths: Sequence[int]) -> None:
    ends = [start + length for start, length in zip(starts, lengths, strict=True)]
    segment, previous = 0, 0
    for first, last in spans:
        if not previous <= first < last:
            raise ValueError(f"bidirectional must be (start, stop) of disjoint spans in ascending order, got {list(spans)}")
        while segment < len(ends) and ends[segment] <= first:
            segment += 1
        if segment == len(ends) or last > ends[segment]:
            raise ValueError(f"bidirectional must have spans within one segment each, got ({first}, {last}), which is cut")
        previous = last
