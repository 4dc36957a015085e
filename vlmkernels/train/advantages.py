"""The advantages of a generation batch, computed from the rewards of the completions of all processes."""

import torch

from vlmkernels.ops.group_advantages import GroupAdvantages, group_advantages
from vlmkernels.ops.group_advantages.turns import turn_advantages
from vlmkernels.rewards import Rewards
from vlmkernels.rollout.base import Rollout
from vlmkernels.train.config import GRPOConfig


def compare_groups(rewards: torch.Tensor, functions: Rewards, num_generations: int, args: GRPOConfig) -> GroupAdvantages:
    """Compare the completions of each group by their rewards, (N, R)."""
    weights = functions.weights.to(rewards.device)
    return group_advantages(rewards, num_generations, weights=weights, scale=args.scale_rewards)


def batch_advantages(
    outcomes: torch.Tensor,
    turns: torch.Tensor | None,
    rollout: Rollout,
    loss_mask: torch.Tensor,
    functions: Rewards,
    args: GRPOConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the advantages of this process's completions.

    Args:
        outcomes: (N, R), the rewards of the outcomes of all processes.
        turns: (N, T), the rewards of turns of all processes, or None.
        rollout: the B completions of this process.
        loss_mask: (B, C) bool, the tokens that count in the loss.

    Returns:
        The advantages, (B,), or (B, C) per token with rewards of turns; and one per completion, (B,), to show: the mean over
        the tokens in the loss.
    """
    start, count = args.process_index * len(loss_mask), len(loss_mask)
    own = slice(start, start + count)
    advantages = compare_groups(outcomes, functions, args.num_generations, args).advantages[own]
    if turns is None:
        return advantages, advantages
    of_turns = turn_advantages(turns, args.num_generations, scale=args.scale_rewards)[own].to(args.device)
    per_token = advantages.unsqueeze(1) + rollout.per_token(of_turns)
    return per_token, (per_token * loss_mask).sum(1) / loss_mask.sum(1).clamp(min=1)
