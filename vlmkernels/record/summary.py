"""Statistics of rewards and completion lengths, under TRL's names."""

import math

import torch

from vlmkernels.ops.group_advantages import GroupAdvantages

NGRAM = 4  # tokens of the sequences whose repetition is counted
MULTIPLIERS = (
    6364136223846793005,
    3935559000370003845,
    2862933555777941757,
    3202034522624059733,
)  # odd, of a hash of NGRAM ids


def _mean_std(values: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation (ddof 1) of the values that are not NaN; NaN if there are too few values."""
    values = values[~values.isnan()]
    mean = values.mean().item() if len(values) else math.nan
    return mean, values.std().item() if len(values) > 1 else math.nan


def reward_metrics(rewards: torch.Tensor, names: list[str], advantages: GroupAdvantages) -> dict[str, float]:
    """Compute the reward metrics of N completions.

    Args:
        rewards: (N, R), one column per reward function; NaN = not scored.
        names: the R names of the reward functions.
        advantages: the result of ``group_advantages`` for these rewards.
    """
    metrics = {}
    for name, column in zip(names, rewards.T, strict=True):
        metrics[f"rewards/{name}/mean"], metrics[f"rewards/{name}/std"] = _mean_std(column)
    total = advantages.rewards.masked_fill(rewards.isnan().all(1), math.nan)
    metrics["reward"], metrics["reward_std"] = _mean_std(total)
    metrics["frac_reward_zero_std"] = advantages.degenerate.float().mean().item()
    return metrics


def completion_metrics(lengths: torch.Tensor, truncated: torch.Tensor) -> dict[str, float]:
    """Compute the length metrics of N completions. The terminated lengths are 0 if every completion is truncated.

    Args:
        lengths: (N,), in tokens.
        truncated: (N,) bool, completions without an end-of-sequence token.
    """
    lengths = lengths.float()
    terminated = lengths.new_zeros(1) if truncated.all() else lengths[~truncated]
    metrics = {"completions/clipped_ratio": truncated.float().mean().item()}
    for name, values in (("length", lengths), ("terminated_length", terminated)):
        metrics[f"completions/mean_{name}"] = values.mean().item()
        metrics[f"completions/min_{name}"] = values.min().item()
        metrics[f"completions/max_{name}"] = values.max().item()
    return metrics


def token_metrics(ids: torch.Tensor, mask: torch.Tensor, unwanted: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compute the metrics of the sampled tokens of N completions. Does not synchronize the device.

    Args:
        ids: (N, C) int64.
        mask: (N, C) bool, the tokens that the model sampled.
        unwanted: (V,) bool, the tokens that must not be sampled.
    """
    tokens = mask.sum(1).clamp(min=1)
    return {
        "completions/frac_special_tokens": ((unwanted[ids] & mask).sum(1) / tokens).mean(),
        "completions/frac_repeated": repeated_share(ids, mask).mean(),
    }


def repeated_share(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the share of each completion's sequences of ``NGRAM`` tokens that occurred in it before, (N,) fp32.

    It is 0 for a completion with fewer tokens.
    """
    if ids.shape[1] < NGRAM:
        return torch.zeros(len(ids), device=ids.device)
    is_sampled = mask.unfold(1, NGRAM, 1).all(2)
    hashes = (ids.unfold(1, NGRAM, 1) * torch.tensor(MULTIPLIERS).to(ids.device, non_blocking=True)).sum(2)
    places = torch.arange(hashes.shape[1], device=ids.device)
    ordered = hashes.where(is_sampled, -1 - places).sort(1).values  # different numbers where a token was not sampled
    return (ordered.diff(dim=1) == 0).sum(1) / is_sampled.sum(1).clamp(min=1)


def length_correlation(advantages: GroupAdvantages, lengths: torch.Tensor, num_generations: int) -> float:
    """Return the correlation of rewards and lengths within groups, over all of N completions; 0 if either never differs.

    Args:
        advantages: the result of ``group_advantages`` for the rewards of the completions.
        lengths: (N,), in tokens.
        num_generations: size of the groups, which are adjacent.
    """
    reward = (advantages.rewards - advantages.mean).nan_to_num()  # not scored: as the mean of the group
    reward = reward.masked_fill(advantages.degenerate, 0.0)  # the mean of equal rewards may be rounded
    groups = lengths.to(reward).view(-1, num_generations)
    length = (groups - groups.mean(1, keepdim=True)).flatten()
    return ((reward @ length) / (reward.norm() * length.norm())).nan_to_num(0.0).item()
