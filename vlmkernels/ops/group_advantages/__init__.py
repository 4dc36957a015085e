"""Group-relative advantages from rewards. Imports only torch: triton and ``_C`` load on first use."""

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate
from numbers import Integral
from typing import Any

import torch
from torch.library import define, impl, register_fake

from vlmkernels.backend import resolve, select
from vlmkernels.ops.arguments import as_tensor
from vlmkernels.ops.checks import (
    require_device,
    require_nowhere,
    require_number,
    require_one_of,
    require_shape,
)
from vlmkernels.ops.dispatch import needs_dispatcher, schema
from vlmkernels.ops.group_advantages.inputs import GroupAdvantages, Inputs

__all__ = ["GroupAdvantages", "group_advantages"]

FWD = "vlmkernels::group_advantages"

define(FWD, f"({schema(Inputs)}) -> ({schema(GroupAdvantages)})")

SCALES = ("group", "batch", "none")
BASELINES = ("mean", "leave_one_out", "pass_at_k", "none")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")


def _outputs(inputs: Inputs) -> GroupAdvantages:
    new, num = inputs.rewards.new_empty, inputs.rewards.shape[0]
    return GroupAdvantages(new(num), new(num), new(num), new(num), new(num, dtype=torch.bool))


def _fwd(*args: Any) -> GroupAdvantages:
    inputs = Inputs(*args)
    outputs = _outputs(inputs)
    weights = inputs.weights
    # The sum is finite only if all weights are, and it is faster.
    if weights is not None and weights.device.type == "cpu" and not math.isfinite(weights.sum().item()):
        require_nowhere(~weights.isfinite(), "weights", "be finite", weights)
    if inputs.rewards.device.type == "cpu":
        require_nowhere(inputs.rewards.isinf(), "rewards", "be finite, or NaN for not scored", inputs.rewards)
    if len(inputs.rewards):
        select("group_advantages", inputs.backend, inputs.rewards).fwd(inputs, outputs)
    return outputs


impl(FWD, "default", _fwd)


def _fwd_fake(*args: Any) -> GroupAdvantages:
    return _outputs(Inputs(*args))


register_fake(FWD, _fwd_fake)


def group_advantages(
    rewards: torch.Tensor | Sequence[Any],
    num_generations: int | None = None,
    *,
    group_sizes: Sequence[int] | torch.Tensor | None = None,
    weights: torch.Tensor | Sequence[float] | None = None,
    scale: str = "group",
    baseline: str = "mean",
    aggregation: str = "sum_then_normalize",
    eps: float = 1e-4,
    backend: str = "auto",
) -> GroupAdvantages:
    """Compute the advantage of each completion over the other completions of its group.

    Equivalent, for groups of one size and rewards without NaN, to::

        r = (rewards * weights).sum(1).view(-1, num_generations)
        advantages = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + eps)

    If all rewards of a group are equal, its advantages are exactly 0, also with eps = 0 and if the mean is rounded. With
    baseline="none" the advantage is the reward divided according to ``scale``, or 0 if it would be divided by a standard
    deviation of 0.

    Args:
        rewards: (N,) or (N, R), finite numbers of any dtype, or a list of them. NaN, and None in a list, mean not scored. A
            completion that no function scored has advantage 0 and does not enter the statistics of its group.
        num_generations: G, the number of completions of each group. The completions of a group are adjacent; G divides N.
        group_sizes: instead of num_generations: the sizes of the groups in order, each >= 1. They add up to N.
        weights: (R,), finite: the weight of each reward function. Default 1 each.
        scale: divide by the standard deviation (ddof 1) of the "group" or of the "batch", or do not divide ("none", Dr. GRPO).
        baseline: subtract the "mean" of the group (GRPO), the mean of the other completions ("leave_one_out", RLOO), or nothing
            ("none"). With "pass_at_k" the best completion of the group gets its lead over the second best, and all others 0.
        aggregation: "sum_then_normalize": normalize the weighted sum of a completion's rewards. "normalize_then_sum" (GDPO):
            normalize the rewards of each function within the group, and their weighted sum within the batch; ``scale`` and
            ``baseline`` must then have their defaults.
        eps: added to the standard deviation; >= 0.
        backend: see ``vlmkernels.backend``.

    Returns:
        ``GroupAdvantages``, without gradients, in fp32 (fp64 for fp64 rewards, which the reference supports).

    Raises:
        ValueError, TypeError: an argument breaks a rule above. Whether rewards and weights are finite is checked only on the
            CPU (on a GPU the check would wait for the device).
        NotImplementedError: the named backend does not support these tensors.

    Source: section 4.1 of Shao et al., DeepSeekMath (https://arxiv.org/abs/2402.03300); also on arXiv: 2503.20783
    (scale="none"), 2402.14740 (leave_one_out), 2503.19595 (pass_at_k), 2601.05242 (normalize_then_sum).
    """
    if not isinstance(rewards, torch.Tensor):
        rewards = _without_none(rewards.tolist() if hasattr(rewards, "tolist") else rewards)
    rewards = as_tensor("rewards", rewards, dtype=torch.float32)
    if rewards.dim() not in (1, 2):
        raise ValueError(f"rewards must be (N,) or (N, R), got {tuple(rewards.shape)}")
    require_one_of("scale", scale, SCALES)
    require_one_of("baseline", baseline, BASELINES)
    require_one_of("aggregation", aggregation, AGGREGATIONS)
    if aggregation == "normalize_then_sum":
        for name, value, default in (("scale", scale, "group"), ("baseline", baseline, "mean")):
            if value != default:
                raise ValueError(f"{name} must be {default!r} with aggregation = 'normalize_then_sum', got {value!r}")
    require_number("eps", eps, "be a number")
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    rewards = rewards.detach()
    if rewards.dtype not in (torch.float32, torch.float64):
        rewards = rewards.float()
    rewards = rewards.unsqueeze(1) if rewards.dim() == 1 else rewards
    if weights is not None:
        weights = as_tensor("weights", weights, rewards.device, torch.float32)
        require_shape("weights", weights, rewards.shape[1:], "one reward")
        require_device("weights", weights, rewards.device, "rewards")
        weights = weights.detach().to(rewards.dtype)
    offsets, group_size = _groups(len(rewards), num_generations, group_sizes, rewards.device)
    inputs = Inputs(
        rewards=rewards,
        weights=weights,
        offsets=offsets,
        group_size=group_size,
        scale=scale,
        baseline=baseline,
        normalize_first=aggregation == "normalize_then_sum",
        eps=float(eps),
        backend=resolve("group_advantages", backend),
    )
    fwd = torch.ops.vlmkernels.group_advantages if needs_dispatcher(rewards, weights) else _fwd
    return GroupAdvantages(*fwd(*inputs))


def _without_none(rewards: Any) -> Any:
    """Replace None in a list of rewards, or of lists of them, by NaN."""
    if rewards is None:
        return math.nan
    return [_without_none(reward) for reward in rewards] if isinstance(rewards, (list, tuple)) else rewards


def _groups(
    num: int, num_generations: int | None, sizes: Sequence[int] | torch.Tensor | None, device: torch.device
) -> tuple[torch.Tensor | None, int]:
    """Check the sizes of the groups, and return the fields offsets and group_size of ``Inputs``."""
    if (num_generations is None) == (sizes is None):
        given = "both" if sizes is not None else "neither"
        raise ValueError(f"num_generations or group_sizes must be given, one of the two, got {given}")
    if sizes is None:
        require_number("num_generations", num_generations, "be an integer", Integral)
        assert num_generations is not None
        if num_generations < 1:
            raise ValueError(f"num_generations must be >= 1, got {num_generations}")
        if num % num_generations:
            raise ValueError(f"num_generations must divide the {num} completions of rewards, got {num_generations}")
        return None, int(num_generations)
    sizes = sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes
    if not isinstance(sizes, Iterable):
        raise TypeError(f"group_sizes must be a sequence of integers, got {sizes}")
    sizes = list(sizes)
    for size in sizes:
        require_number("group_sizes", size, "be integers", Integral)
    if any(size < 1 for size in sizes):
        raise ValueError(f"group_sizes must be >= 1 each, got {sizes}")
    if sum(sizes) != num:
        raise ValueError(f"group_sizes must add up to the {num} completions of rewards, got {sizes} = {sum(sizes)}")
    offsets = list(accumulate(sizes, initial=0))
    return torch.tensor(offsets, dtype=torch.int32, device=device), int(max(sizes, default=1))
