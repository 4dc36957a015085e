"""Which tokens of a pack see which: [prefix | c1 | ... | cG], group after group."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain

import torch

from vlmkernels.ops.checks import require


@dataclass(frozen=True)
class GroupLayout:
    """The lengths of a pack's groups, on the host. A token sees itself and what is before it on its own path: the prefix, then
    its own completion.

    Args:
        prefixes: tokens of each group's prefix, >= 1.
        completions: tokens of each group's completions, each >= 0; as many groups.
    """

    prefixes: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        require(
            len(self.prefixes) == len(self.completions), "completions", f"be of {len(self.prefixes)} groups", self.completions
        )
        require(all(length >= 1 for length in self.prefixes), "prefixes", "hold at least one token each", self.prefixes)
        sound = all(length >= 0 for group in self.completions for length in group)
        require(sound, "completions", "have lengths >= 0", self.completions)

    @cached_property
    def segments(self) -> tuple[int, ...]:
        """Lengths of all prefixes and completions, in the order of the pack."""
        return tuple(chain.from_iterable((p, *c) for p, c in zip(self.prefixes, self.completions, strict=True)))

    @cached_property
    def num_tokens(self) -> int:
        return sum(self.segments)

    @cached_property
    def groups(self) -> tuple[tuple[int, int, int], ...]:
        """(start of the prefix, start of the completions, end) of each group, in tokens."""
        sizes = [p + sum(c) for p, c in zip(self.prefixes, self.completions, strict=True)]
        starts = accumulate(sizes, initial=0)
        return tuple((s, s + p, s + n) for s, p, n in zip(starts, self.prefixes, sizes, strict=False))

    @cached_property
    def tokens(self) -> torch.Tensor:
        """(2, T) int32 on the CPU: the group of each token, and its segment, with 0 for every prefix."""
        group, segment, number = [], [], 0
        for index, (prefix, completions) in enumerate(zip(self.prefixes, self.completions, strict=True)):
            for position, length in enumerate((prefix, *completions)):
                number += position > 0
                group.append(torch.full((length,), index, dtype=torch.int32))
                segment.append(torch.full((length,), number if position else 0, dtype=torch.int32))
        return torch.stack([torch.cat(group), torch.cat(segment)]) if group else torch.zeros(2, 0, dtype=torch.int32)

    def mask(self) -> torch.Tensor:
        """(N, N) bool: whether row i sees column j. The definition; for tests, and small packs alone."""
        group, segment = self.tokens
        own = (segment[:, None] == segment) | (segment == 0)
        return ((group[:, None] == group) & own).tril()
