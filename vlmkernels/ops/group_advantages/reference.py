"""Group-relative advantages in plain PyTorch: the oracle of ``group_advantages``.

A = (r - baseline) / (scale + eps), where r is a completion's weighted reward and both come from its group (or, the scale, from
the batch). Completions that nobody scored take no part.
"""

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


def moments(r: torch.Tensor, scored: torch.Tensor, groups: Groups):
    """Number, mean and standard deviation (ddof 1; 0 for fewer than two) of the scored rows of each row's group."""
    count = groups.total(scored.to(r.dtype))
    mean = groups.total(torch.where(scored, r, 0)) / count.clamp(min=1)
    square = groups.total(torch.where(scored, (r - mean).square(), 0))
    return count, mean, (square / (count - 1).clamp(min=1)).sqrt()


def equal(r: torch.Tensor, scored: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Whether the scored rows of each row's group do not differ."""
    return groups.greatest(torch.where(scored, r, -torch.inf)) <= -groups.greatest(torch.where(scored, -r, -torch.inf))


def no_baseline(r, scored, groups, count, mean):
    return r


def group_mean(r, scored, groups, count, mean):
    """https://arxiv.org/abs/2402.03300, section 4.1"""
    return torch.where(equal(r, scored, groups), 0, r - mean)


def leave_one_out(r, scored, groups, count, mean):
    """r minus the mean of the others, RLOO: https://arxiv.org/abs/2402.14740"""
    return group_mean(r, scored, groups, count, mean) * count / (count - 1).clamp(min=1)


def pass_at_k(r, scored, groups, count, mean):
    """Only the best completion counts, by how much it beats the second best: https://arxiv.org/abs/2503.19595"""
    candidates = torch.where(scored, r, -torch.inf)
    best = groups.greatest(candidates)
    alone = groups.total((candidates == best).to(r.dtype)) == 1
    second = groups.greatest(torch.where(candidates == best, -torch.inf, candidates))
    return torch.where((r == best) & alone & (count > 1), best - second, 0)


BASELINES = {"none": no_baseline, "mean": group_mean, "leave_one_out": leave_one_out, "pass_at_k": pass_at_k}


def fwd(rewards, weights, starts, group_size, rules, eps, advantages, total, mean, std, degenerate):
    """Write the results; ``rules`` is (scale, baseline, aggregation)."""
    scale, baseline, aggregation = rules
    groups, batch = Groups(len(rewards), starts, group_size, rewards.device), Batch(len(rewards), rewards.device)
    given = ~rewards.isnan()
    scored = given.any(1)
    weights = rewards.new_ones(rewards.shape[1]) if weights is None else weights
    r = (rewards * weights).nansum(1)
    count, group_mean_, group_std = moments(r, scored, groups)
    if aggregation == "normalize_then_sum":
        # GDPO: each function's rewards are normalised in the group, their sum in the batch. https://arxiv.org/abs/2601.05242
        combined = torch.zeros_like(r)
        for x, has, weight in zip(rewards.unbind(1), given.unbind(1), weights, strict=True):
            _, mean_k, std_k = moments(x.nan_to_num(), has, groups)
            idle = ~has | equal(x.nan_to_num(), has, groups)
            combined += weight * torch.where(idle, 0, (x.nan_to_num() - mean_k) / (std_k + eps))
        _, batch_mean, batch_std = moments(combined, scored, batch)
        result = torch.where(equal(combined, scored, batch), 0, combined - batch_mean) / (batch_std + eps)
    else:
        result = BASELINES[baseline](r, scored, groups, count, group_mean_)
        if scale != "none":
            result = result / ((group_std if scale == "group" else moments(r, scored, batch)[2]) + eps)
    advantages.copy_(torch.where(scored, result, 0))
    total.copy_(torch.where(scored, r, torch.nan))
    mean.copy_(group_mean_)
    std.copy_(group_std)
    degenerate.copy_(equal(r, scored, groups))
