"""The layout of a pack of groups [prefix | c1 | ... | cG], one after another, and its attention mask."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain

import torch


@dataclass(frozen=True)
class GroupLayout:
    """The lengths of the prefixes and completions of a pack, on the host.

    A token sees itself and the earlier tokens of its path: the prefix of its group, then its own completion.

    Args:
        prefixes: for each group, the number of tokens of its prefix; >= 1.
        completions: for each group, the number of tokens of each of its completions; >= 0.
    """

    prefixes: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.prefixes) != len(self.completions):
            raise ValueError(f"completions must be of {len(self.prefixes)} groups, got {self.completions}")
        if any(length < 1 for length in self.prefixes):
            raise ValueError(f"prefixes must hold at least one token each, got {self.prefixes}")
        if any(length < 0 for group in self.completions for length in group):
            raise ValueError(f"completions must have lengths >= 0, got {self.completions}")

    @cached_property
    def segments(self) -> tuple[int, ...]:
        """The lengths of all prefixes and completions, in the order of the pack."""
        return tuple(chain.from_iterable((p, *c) for p, c in zip(self.prefixes, self.completions, strict=True)))

    @cached_property
    def num_tokens(self) -> int:
        """The number of tokens of the pack."""
        return sum(self.segments)

    @cached_property
    def num_pairs(self) -> int:
        """The number of pairs of a token and a token that it sees."""
        own = sum(length * (length + 1) // 2 for length in self.segments)
        return own + sum(prefix * sum(lengths) for prefix, lengths in zip(self.prefixes, self.completions, strict=True))

    @cached_property
    def groups(self) -> tuple[tuple[int, int, int], ...]:
        """(start of the prefix, start of the completions, end) of each group, in tokens."""
        sizes = [p + sum(c) for p, c in zip(self.prefixes, self.completions, strict=True)]
        starts = accumulate(sizes, initial=0)
        return tuple((s, s + p, s + n) for s, p, n in zip(starts, self.prefixes, sizes, strict=False))

    @cached_property
    def tokens(self) -> torch.Tensor:
        """(2, N) int32 on the CPU: the group of each token; and its segment, 0 for prefixes, a number > 0 per completion."""
        group, segment, number = [], [], 0
        for index, (prefix, completions) in enumerate(zip(self.prefixes, self.completions, strict=True)):
            for position, length in enumerate((prefix, *completions)):
                number += position > 0
                group.append(torch.full((length,), index, dtype=torch.int32))
                segment.append(torch.full((length,), number if position else 0, dtype=torch.int32))
        return torch.stack([torch.cat(group), torch.cat(segment)]) if group else torch.zeros(2, 0, dtype=torch.int32)

    def mask(self) -> torch.Tensor:
        """Return (N, N) bool, whether token i sees token j. It defines the attention; use it only for small packs."""
        group, segment = self.tokens
        own = (segment[:, None] == segment) | (segment == 0)
        mask: torch.Tensor = (group[:, None] == group) & own
        return mask.tril()
