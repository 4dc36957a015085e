"""Division of trees of segments into packs within a token budget."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlmkernels.ops.tree_attention import TreeLayout


@dataclass(frozen=True)
class Pack:
    """Segments of trees that run in one forward pass.

    Attributes:
        segments: the indices of the segments, in depth-first order. Every segment comes with all its ancestors.
        parents: for each of them the index in ``segments`` of its parent, or -1.
        owned: the segments whose tokens this pack scores. Every segment is owned by one pack; others only repeat it.
    """

    segments: tuple[int, ...]
    parents: tuple[int, ...]
    owned: tuple[int, ...]


def cut_trees(lengths: Sequence[int], parents: Sequence[int], max_tokens: int, hidden_size: int) -> list[Pack]:
    """Divide trees into packs of at most ``max_tokens`` tokens, with few repeated tokens, in few packs of about equal cost.

    From the leaves to the roots, the parts of the children of a segment are distributed over as few bins as a heuristic finds;
    each bin, with the segment, is a part of the segment. So a subtree is divided, and its root repeated, only if it does not
    fit into a pack with its ancestors. Of several heuristics, the result with the fewest repeated tokens is returned, then with
    the fewest packs, then with the least cost of its most expensive pack.

    The smallest number of repeated tokens is NP-hard to find. For trees of two levels, first-fit decreasing divides a tree into
    at most 11/9 of the smallest number of parts, plus 6/9. For deeper trees there is no proven bound. Compared with all
    divisions of 20,000 random trees with up to nine leaves (tests/models/test_cut.py), 99.8 % of the results have the smallest
    number of tokens, and the worst has 16 % more.

    The cost counts the operations of a transformer layer of hidden size H: 24 H^2 per token (linear layers) and 4 H per pair of
    tokens (attention).

    Args:
        lengths: the number of tokens of each segment.
        parents: for each segment the segment that it continues, or -1; in depth-first order, as in ``TreeLayout``.
        max_tokens: the largest number of tokens in a pack.
        hidden_size: H.

    Returns:
        The packs, in the order of their segments.

    Raises:
        ValueError: the parents are not those of trees, or ``max_tokens`` is less than the longest path. The message says how
            many tokens are needed.

    Source: Dosa, The tight bound of first fit decreasing bin-packing algorithm is FFD(I) <= 11/9 OPT(I) + 6/9 (2007).
    """
    layout = TreeLayout(tuple(lengths), tuple(parents))
    if layout.longest_path > max_tokens:
        paths = [offset + length for offset, length in zip(layout.offsets, layout.lengths, strict=True)]
        path = ", ".join(map(str, layout.path(paths.index(layout.longest_path))))
        raise ValueError(
            f"max_tokens_per_microbatch must be at least {layout.longest_path}, the tokens of the path of segments {path}, "
            f"got {max_tokens}"
        )
    if not layout.lengths:
        return []
    results = [
        _cut(layout, max_tokens, hidden_size, fill, balance_all)
        for fill in (_first_fit, _fullest)
        for balance_all in (True, False)
    ]
    best = min(results, key=lambda parts: (sum(p.tokens for p in parts), len(parts), max(p.cost for p in parts)))
    return _as_packs(best, layout)


def cut_packs(
    prefixes: Sequence[int], group: Sequence[int], lengths: Sequence[int], max_tokens: int, hidden_size: int
) -> list[list[int]]:
    """Divide the completions of prompts into packs of at most ``max_tokens`` tokens, as ``cut_trees`` does.

    Each pack contains the prompts of its completions.

    Args:
        prefixes: the number of tokens of each prompt.
        group: the index of each completion's prompt.
        lengths: the number of tokens of each completion.
        max_tokens: the largest number of tokens in a pack.
        hidden_size: see ``cut_trees``.

    Returns:
        The indices of the completions of each pack, ascending.

    Raises:
        ValueError: ``max_tokens`` is less than a prompt with one of its completions. The message says how many are needed.
    """
    sizes: list[int] = []
    parents: list[int] = []
    completions: dict[int, int] = {}  # by segment
    for index in sorted(set(group)):
        root, members = len(sizes), [k for k, owner in enumerate(group) if owner == index]
        longest = max(lengths[k] for k in members)
        if prefixes[index] + longest > max_tokens:
            least = f"{prefixes[index] + longest}, a prompt of {prefixes[index]} tokens and a completion of {longest}"
            raise ValueError(f"max_tokens_per_microbatch must be at least {least}, got {max_tokens}")
        completions |= {root + 1 + place: k for place, k in enumerate(members)}
        sizes += [prefixes[index], *(lengths[k] for k in members)]
        parents += [-1, *[root] * len(members)]
    packs = cut_trees(sizes, parents, max_tokens, hidden_size)
    return sorted(sorted(completions[segment] for segment in pack.segments if segment in completions) for pack in packs)


@dataclass(frozen=True)
class _Part:
    """Segments that are not divided further. Their tokens and cost, without those of the ancestors of all of them."""

    segments: tuple[int, ...]
    tokens: int
    cost: float

    @classmethod
    def union(cls, parts: Sequence["_Part"]) -> "_Part":
        segments = sorted(segment for part in parts for segment in part.segments)
        return cls(tuple(segments), sum(part.tokens for part in parts), sum(part.cost for part in parts))


def _cut(
    layout: TreeLayout,
    max_tokens: int,
    hidden_size: int,
    fill: Callable[[Sequence[_Part], int], list[list[int]]],
    balance_all: bool,
) -> list[_Part]:
    """Return the packs found with one heuristic.

    Args:
        fill: distributes parts over few bins of a capacity. Returns the indices of the parts in each bin.
        balance_all: whether to balance the cost of the parts of every segment, or only that of the packs. Balanced parts are
            sometimes harder to combine.
    """
    roots = len(layout.lengths)
    pending: list[list[_Part]] = [[] for _ in range(roots + 1)]  # the parts of the children of each segment; then all trees
    for segment in reversed(range(roots)):
        length, offset = layout.lengths[segment], layout.offsets[segment]
        own = _Part((segment,), length, 6.0 * hidden_size * length + length * (offset + length / 2))
        parts, capacity = pending[segment], max_tokens - offset - length
        bins = fill(parts, capacity) or [[]]
        if balance_all:
            bins = _balance(bins, parts, capacity)
        pending[layout.parents[segment]] += [_Part.union([own, *(parts[index] for index in chosen)]) for chosen in bins]
    trees = pending[roots]
    return [_Part.union([trees[i] for i in chosen]) for chosen in _balance(fill(trees, max_tokens), trees, max_tokens)]


def _as_packs(parts: list[_Part], layout: TreeLayout) -> list[Pack]:
    """Return the packs. The first one that contains a segment owns it."""
    packs: list[Pack] = []
    seen: set[int] = set()
    for part in sorted(parts, key=lambda part: part.segments):
        place = {segment: index for index, segment in enumerate(part.segments)} | {-1: -1}
        parents = tuple(place[layout.parents[segment]] for segment in part.segments)
        packs.append(Pack(part.segments, parents, tuple(segment for segment in part.segments if segment not in seen)))
        seen.update(part.segments)
    return packs


def _first_fit(parts: Sequence[_Part], capacity: int) -> list[list[int]]:
    """First-fit decreasing: put each part, the largest first, into the first bin with room for it."""
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(parts)), key=lambda item: -parts[item].tokens):
        index = next((index for index, free in enumerate(room) if parts[item].tokens <= free), len(bins))
        if index == len(bins):
            bins.append([])
            room.append(capacity)
        bins[index].append(item)
        room[index] -= parts[item].tokens
    return bins


def _fullest(parts: Sequence[_Part], capacity: int) -> list[list[int]]:
    """Fill bin after bin: put the largest part that is left and those others into it that leave the least room."""
    left = sorted(range(len(parts)), key=lambda item: -parts[item].tokens)
    bins = []
    while left:
        first, rest = left[0], left[1:]
        room = capacity - parts[first].tokens
        sums = [1]  # bit n of sums[k]: whether some of the first k parts have n tokens together
        for item in rest:
            sums.append((sums[-1] | sums[-1] << parts[item].tokens) & ((1 << room + 1) - 1))
        total, chosen = sums[-1].bit_length() - 1, {first}
        for k in reversed(range(len(rest))):
            tokens = parts[rest[k]].tokens
            if tokens == 0 or not sums[k] >> total & 1:
                chosen.add(rest[k])
                total -= tokens
        bins.append([item for item in left if item in chosen])
        left = [item for item in left if item not in chosen]
    return bins


def _balance(bins: list[list[int]], parts: Sequence[_Part], capacity: int) -> list[list[int]]:
    """Put each part, the most expensive first, into the cheapest of as many bins. If a part does not fit, return ``bins``."""
    balanced: list[list[int]] = [[] for _ in bins]
    room, load = [capacity] * len(bins), [0.0] * len(bins)
    for item in sorted(range(len(parts)), key=lambda item: -parts[item].cost):
        fitting = [index for index, free in enumerate(room) if parts[item].tokens <= free]
        if not fitting:
            return bins
        index = min(fitting, key=load.__getitem__)
        balanced[index].append(item)
        room[index] -= parts[item].tokens
        load[index] += parts[item].cost
    return balanced
