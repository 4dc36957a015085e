"""Statistics of rewards and completion lengths, under TRL's names."""

import math

import torch

from vlmkernels.ops.group_advantages import GroupAdvantages


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
