"""A = (r - mean_group(r)) / (std(r) + eps), in plain PyTorch. https://arxiv.org/abs/2402.03300, section 4.1."""

import torch


def _moments(r: torch.Tensor, scored: torch.Tensor, dim: int | tuple[int, int]):
    """Mean and standard deviation (ddof 1; 0 for fewer than two) of the scored entries along ``dim``."""
    count = scored.sum(dim, keepdim=True)
    mean = torch.where(scored, r, 0).sum(dim, keepdim=True) / count.clamp(min=1)
    square = torch.where(scored, (r - mean).square(), 0).sum(dim, keepdim=True)
    return mean, (square / (count - 1).clamp(min=1)).sqrt()


def group_advantages(rewards, num_generations, weights, scale, eps):
    rewards = rewards.float()
    scored = ~rewards.isnan().all(1)
    weighted = rewards if weights is None else rewards * weights.to(rewards)
    r = weighted.nansum(1)
    groups, valid = r.view(-1, num_generations), scored.view(-1, num_generations)
    mean, std = _moments(groups, valid, 1)
    divisor = {"group": std + eps, "batch": _moments(groups, valid, (0, 1))[1] + eps, "none": torch.ones_like(std)}[scale]
    advantages = torch.where(valid, (groups - mean) / divisor, 0)
    mean, std = mean.expand_as(groups), std.expand_as(groups)
    return advantages.flatten(), r, mean.flatten(), std.flatten(), (std == 0).flatten()
