"""Group-relative advantages in plain PyTorch: the oracle of ``group_advantages``.

A = (r - baseline) / (scale + eps), where r is the weighted reward of a completion, the baseline comes from its group, and the
scale from its group or the batch. A is 0 if the scale is 0. Completions that no function scored are left out of all statistics.
"""

from typing import NamedTuple

import torch

from vlmkernels.ops.group_advantages.inputs import GroupAdvantages, Inputs


def unsupported(*tensors: torch.Tensor) -> str | None:
    return None


class Groups(NamedTuple):
    """Statistics over groups of rows."""

    count: int
    index: torch.Tensor  # (N,): the group of each row

    @classmethod
    def from_inputs(cls, inputs: Inputs) -> "Groups":
        sizes = inputs.group_size if inputs.offsets is None else inputs.offsets.diff()
        index = torch.arange(inputs.num_groups, device=inputs.rewards.device).repeat_interleave(sizes)
        return cls(inputs.num_groups, index)

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of x over the group of each row, (N,)."""
        return x.new_zeros(self.count).index_add_(0, self.index, x)[self.index]

    def greatest(self, x: torch.Tensor) -> torch.Tensor:
        """Return the maximum of x over the group of each row, (N,)."""
        return x.new_full((self.count,), -torch.inf).scatter_reduce_(0, self.index, x, "amax")[self.index]


class Moments(NamedTuple):
    """Statistics of the scored rows of each row's group, (N,)."""

    count: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor  # ddof 1; exactly 0 if all scored rows are equal
    equal: torch.Tensor  # whether all scored rows are equal

    def divisor(self, eps: float) -> torch.Tensor:
        """Return std + eps, or infinity if all rows are equal, so that the quotient is exactly 0 for any eps."""
        return torch.where(self.std == 0, torch.inf, self.std + eps)


def moments_of(r: torch.Tensor, scored: torch.Tensor, groups: Groups) -> Moments:
    count = groups.total(scored.to(r.dtype))
    mean = groups.total(torch.where(scored, r, 0)) / count.clamp(min=1)
    square = groups.total(torch.where(scored, (r - mean).square(), 0))
    equal = groups.greatest(torch.where(scored, r, -torch.inf)) <= -groups.greatest(torch.where(scored, -r, -torch.inf))
    return Moments(count, mean, torch.where(equal, 0, (square / (count - 1).clamp(min=1)).sqrt()), equal)


def no_baseline(r, scored, groups, moments):
    return r


def group_mean(r, scored, groups, moments):
    """Return r minus the mean of the group, GRPO: https://arxiv.org/abs/2402.03300, section 4.1"""
    return torch.where(moments.equal, 0, r - moments.mean)


def leave_one_out(r, scored, groups, moments):
    """Return r minus the mean of the other rows, RLOO: https://arxiv.org/abs/2402.14740"""
    return group_mean(r, scored, groups, moments) * moments.count / (moments.count - 1).clamp(min=1)


def pass_at_k(r, scored, groups, moments):
    """Return the best completion's lead over the second best, and 0 for all others: https://arxiv.org/abs/2503.19595"""
    candidates = torch.where(scored, r, -torch.inf)
    best = groups.greatest(candidates)
    alone = groups.total((candidates == best).to(r.dtype)) == 1
    second = groups.greatest(torch.where(candidates == best, -torch.inf, candidates))
    return torch.where((r == best) & alone & (moments.count > 1), best - second, 0)


BASELINES = {"none": no_baseline, "mean": group_mean, "leave_one_out": leave_one_out, "pass_at_k": pass_at_k}


def fwd(inputs: Inputs, outputs: GroupAdvantages) -> None:
    """Write the results."""
    rewards, eps = inputs.rewards, inputs.eps
    groups, batch = Groups.from_inputs(inputs), Groups(1, torch.zeros(len(rewards), dtype=torch.int64, device=rewards.device))
    given = ~rewards.isnan()
    scored = given.any(1)
    weights = rewards.new_ones(rewards.shape[1]) if inputs.weights is None else inputs.weights
    r = (rewards * weights).nansum(1)
    group_moments = moments_of(r, scored, groups)
    if inputs.normalize_first:
        # GDPO: normalize the rewards of each function within the group, and their sum within the batch.
        # https://arxiv.org/abs/2601.05242
        combined = torch.zeros_like(r)
        for x, has, weight in zip(rewards.unbind(1), given.unbind(1), weights, strict=True):
            function_moments = moments_of(x, has, groups)
            z = group_mean(x, has, groups, function_moments) / function_moments.divisor(eps)
            combined += torch.where(has, weight * z, 0)
        batch_moments = moments_of(combined, scored, batch)
        result = group_mean(combined, scored, batch, batch_moments) / batch_moments.divisor(eps)
    else:
        result = BASELINES[inputs.baseline](r, scored, groups, group_moments)
        if inputs.scale != "none":
            result = result / (group_moments if inputs.scale == "group" else moments_of(r, scored, batch)).divisor(eps)
    outputs.advantages.copy_(torch.where(scored, result, 0))
    outputs.rewards.copy_(torch.where(scored, r, torch.nan))
    outputs.mean.copy_(group_moments.mean)
    outputs.std.copy_(group_moments.std)
    outputs.degenerate.copy_(group_moments.equal)
