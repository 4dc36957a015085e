"""Group-relative advantages from rewards."""

from typing import NamedTuple

import torch

from vlmkernels.ops.checks import require
from vlmkernels.ops.group_advantages import reference


class GroupAdvantages(NamedTuple):
    """Per completion, each (N,) fp32: the advantage, the weighted reward, and the mean and standard deviation of the rewards
    of its group; ``degenerate`` (bool) where the group's rewards do not differ."""

    advantages: torch.Tensor
    rewards: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    degenerate: torch.Tensor


SCALES = ("group", "batch", "none")


def group_advantages(
    rewards: torch.Tensor,
    num_generations: int,
    *,
    weights: torch.Tensor | None = None,
    scale: str = "group",
    eps: float = 1e-4,
) -> GroupAdvantages:
    """Advantage of each completion over the others of its group.

    Equivalent to::

        r = (rewards * weights).nansum(1).view(-1, num_generations)
        advantages = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + eps)

    Args:
        rewards: (N,) or (N, R), floating point; NaN = not scored. A completion that no function scored has advantage 0 and
            does not enter its group's statistics.
        num_generations: G; completions of a group follow one another, N is a multiple of G.
        weights: (R,), default 1 each.
        scale: divide by the standard deviation (ddof 1) of the "group", of the "batch", or by nothing ("none", Dr. GRPO).
        eps: added to the standard deviation.

    Raises:
        ValueError: a rule above is broken; the message names argument, rule and value.

    Source: https://arxiv.org/abs/2402.03300 (section 4.1), https://arxiv.org/abs/2503.20783 (scale="none").
    """
    require(rewards.dim() in (1, 2), "rewards", "be (N,) or (N, R)", tuple(rewards.shape))
    rewards = rewards.unsqueeze(1) if rewards.dim() == 1 else rewards
    require(scale in SCALES, "scale", f"be one of {', '.join(SCALES)}", repr(scale))
    require(num_generations >= 1, "num_generations", "be >= 1", num_generations)
    require(len(rewards) % num_generations == 0, "num_generations", f"divide the {len(rewards)} rewards", num_generations)
    if weights is not None:
        require(
            tuple(weights.shape) == (rewards.shape[1],),
            "weights",
            f"be ({rewards.shape[1]},), one per reward",
            tuple(weights.shape),
        )
    return GroupAdvantages(*reference.group_advantages(rewards, num_generations, weights, scale, eps))
