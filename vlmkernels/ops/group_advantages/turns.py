"""Advantages of the turns of trajectories, from one reward per turn."""

import torch

from vlmkernels.ops.group_advantages import group_advantages


def turn_advantages(
    rewards: torch.Tensor, num_generations: int, *, scale: str = "group", eps: float = 1e-4, backend: str = "auto"
) -> torch.Tensor:
    """Compute the advantage of each turn over the same turn of the other trajectories of its group.

    The return of a turn is the sum of the rewards of this turn and all later ones. Turn t of a trajectory is compared with turn
    t of those trajectories of the group that have one. Equivalent, without NaN, to::

        returns = rewards.flip(1).cumsum(1).flip(1)
        advantages = torch.stack([group_advantages(r, num_generations).advantages for r in returns.unbind(1)], 1)

    Args:
        rewards: (N, T), the rewards of up to T turns. NaN: not scored; such a turn counts as 0 in the returns of earlier turns.
            A turn without a scored turn from it on, such as one after the end of a trajectory, has advantage 0.
        num_generations, scale, eps, backend: see ``group_advantages``.

    Returns:
        (N, T), fp32 (fp64 for fp64 rewards), without gradients.

    Raises:
        ValueError: rewards do not have two axes; see ``group_advantages`` for others.
    """
    if rewards.dim() != 2:
        raise ValueError(f"rewards must be (N, T), got {tuple(rewards.shape)}")
    is_scored = ~rewards.isnan()
    returns = rewards.nan_to_num().flip(1).cumsum(1).flip(1)
    counts = is_scored.flip(1).cumsum(1).flip(1) > 0
    returns = returns.masked_fill(~counts, torch.nan)
    if not rewards.shape[1]:
        return returns
    options = {"scale": scale, "eps": eps, "backend": backend}
    return torch.stack([group_advantages(r, num_generations, **options).advantages for r in returns.unbind(1)], 1)
