"""Group-relative advantages in plain PyTorch: the oracle of ``group_advantages``.

A = (r - baseline) / (scale + eps), where r is a completion's weighted reward and both come from its group (or, the scale, from
the batch); 0 where the scale is. Completions that nobody scored take no part.
"""

from typing import NamedTuple

import torch


def unsupported(*tensors: torch.Tensor) -> str | None:
    return None


class Groups:
    """Statistics over groups of rows. The index (N,) says whose a row is."""

    def __init__(self, num: int, starts: torch.Tensor | None, group_size: int, device) -> None:
        sizes = group_size if starts is None else starts.diff()
        self.count = num // max(group_size, 1) if starts is None else len(starts) - 1
        self.index = torch.arange(self.count, device=device).repeat_interleave(sizes)

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """(N,) -> the sum of each row's group, (N,)"""
        return x.new_zeros(self.count).index_add_(0, self.index, x)[self.index]

    def greatest(self, x: torch.Tensor) -> torch.Tensor:
        """(N,) -> the maximum of each row's group, (N,)"""
        return x.new_full((self.count,), -torch.inf).scatter_reduce_(0, self.index, x, "amax")[self.index]


class Batch(Groups):
    """One group of all rows."""

    def __init__(self, num: int, device) -> None:
        self.count, self.index = 1, torch.zeros(num, dtype=torch.int64, device=device)


class Moments(NamedTuple):
    """Of the scored rows of each row's group, (N,)."""

    count: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor  # ddof 1; exactly 0 where they do not differ
    equal: torch.Tensor  # whether they do not

    def divisor(self, eps: float) -> torch.Tensor:
        """Infinite where the rows do not differ, whatever eps: what is divided is exactly 0."""
        return torch.where(self.std == 0, torch.inf, self.std + eps)


def moments(r: torch.Tensor, scored: torch.Tensor, groups: Groups) -> Moments:
    count = groups.total(scored.to(r.dtype))
    mean = groups.total(torch.where(scored, r, 0)) / count.clamp(min=1)
    square = groups.total(torch.where(scored, (r - mean).square(), 0))
    equal = groups.greatest(torch.where(scored, r, -torch.inf)) <= -groups.greatest(torch.where(scored, -r, -torch.inf))
    return Moments(count, mean, torch.where(equal, 0, (square / (count - 1).clamp(min=1)).sqrt()), equal)


def no_baseline(r, scored, groups, of):
    return r


def group_mean(r, scored, groups, of):
    """https://arxiv.org/abs/2402.03300, section 4.1"""
    return torch.where(of.equal, 0, r - of.mean)


def leave_one_out(r, scored, groups, of):
    """r minus the mean of the others, RLOO: https://arxiv.org/abs/2402.14740"""
    return group_mean(r, scored, groups, of) * of.count / (of.count - 1).clamp(min=1)


def pass_at_k(r, scored, groups, of):
    """Only the best completion counts, by how much it beats the second best: https://arxiv.org/abs/2503.19595"""
    candidates = torch.where(scored, r, -torch.inf)
    best = groups.greatest(candidates)
    alone = groups.total((candidates == best).to(r.dtype)) == 1
    second = groups.greatest(torch.where(candidates == best, -torch.inf, candidates))
    return torch.where((r == best) & alone & (of.count > 1), best - second, 0)


BASELINES = {"none": no_baseline, "mean": group_mean, "leave_one_out": leave_one_out, "pass_at_k": pass_at_k}


def fwd(rewards, weights, starts, group_size, rules, eps, advantages, total, mean, std, degenerate):
    """Write the results; ``rules`` is (scale, baseline, aggregation)."""
    scale, baseline, aggregation = rules
    groups, batch = Groups(len(rewards), starts, group_size, rewards.device), Batch(len(rewards), rewards.device)
    given = ~rewards.isnan()
    scored = given.any(1)
    weights = rewards.new_ones(rewards.shape[1]) if weights is None else weights
    r = (rewards * weights).nansum(1)
    of_group = moments(r, scored, groups)
    if aggregation == "normalize_then_sum":
        # GDPO: each function's rewards are normalised in the group, their sum in the batch. https://arxiv.org/abs/2601.05242
        combined = torch.zeros_like(r)
        for x, has, weight in zip(rewards.unbind(1), given.unbind(1), weights, strict=True):
            of_function = moments(x, has, groups)
            z = group_mean(x, has, groups, of_function) / of_function.divisor(eps)
            combined += torch.where(has, weight * z, 0)
        of_batch = moments(combined, scored, batch)
        result = group_mean(combined, scored, batch, of_batch) / of_batch.divisor(eps)
    else:
        result = BASELINES[baseline](r, scored, groups, of_group)
        if scale != "none":
            result = result / (of_group if scale == "group" else moments(r, scored, batch)).divisor(eps)
    advantages.copy_(torch.where(scored, result, 0))
    total.copy_(torch.where(scored, r, torch.nan))
    mean.copy_(of_group.mean)
    std.copy_(of_group.std)
    degenerate.copy_(of_group.equal)
