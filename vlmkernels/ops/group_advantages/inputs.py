"""The arguments of the operator and the backends of ``group_advantages``."""

from typing import NamedTuple

import torch


class Inputs(NamedTuple):
    """The arguments of the operator, in the order of its schema."""

    rewards: torch.Tensor  # (N, R), NaN: not scored
    weights: torch.Tensor | None  # (R,); None: 1 each
    offsets: torch.Tensor | None  # (K + 1,) int32: group g is [offsets[g], offsets[g + 1]); None: groups of group_size
    group_size: int  # the size of the largest group
    scale: str
    baseline: str
    normalize_first: bool  # aggregation = "normalize_then_sum"
    eps: float
    backend: str

    @property
    def num_groups(self) -> int:
        return len(self.rewards) // max(self.group_size, 1) if self.offsets is None else len(self.offsets) - 1


class GroupAdvantages(NamedTuple):
    """The results of ``group_advantages``, one element per completion, (N,)."""

    advantages: torch.Tensor
    rewards: torch.Tensor  # the weighted reward; NaN: no function scored the completion
    mean: torch.Tensor  # the mean of the weighted rewards of the group
    std: torch.Tensor  # the standard deviation of the weighted rewards of the group, ddof 1
    degenerate: torch.Tensor  # bool: all weighted rewards of the group are equal
