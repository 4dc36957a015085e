"""Group-relative advantages from rewards. Torch only: triton and ``_C`` load on first use."""

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import NamedTuple

import torch
from torch.library import define, impl, register_fake

from vlmkernels.backend import resolve, select
from vlmkernels.ops.checks import (
    require,
    require_device,
    require_nowhere,
    require_number,
    require_one_of,
    require_shape,
    require_tensor,
)
from vlmkernels.ops.dispatch import needs_dispatcher

FWD = "vlmkernels::group_advantages"

# starts: (K + 1,) int32, group g is [starts[g], starts[g + 1]); None: groups of group_size. group_size: the greatest size.
define(
    FWD,
    "(Tensor rewards, Tensor? weights, Tensor? starts, int group_size, str[] rules, float eps, str backend)"
    " -> (Tensor advantages, Tensor rewards, Tensor mean, Tensor std, Tensor degenerate)",
)

SCALES = ("group", "batch", "none")
BASELINES = ("mean", "leave_one_out", "pass_at_k", "none")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")


def _outputs(rewards):
    empty = lambda dtype: torch.empty(len(rewards), dtype=dtype, device=rewards.device)  # noqa: E731
    return *(empty(rewards.dtype) for _ in range(4)), empty(torch.bool)


def _fwd(rewards, weights, starts, group_size, rules, eps, backend):
    outputs = _outputs(rewards)
    if weights is not None and weights.device.type == "cpu":
        require_nowhere(~weights.isfinite(), "weights", "be finite", weights)
    if len(rewards):
        select("group_advantages", backend, rewards).fwd(rewards, weights, starts, group_size, rules, eps, *outputs)
    return outputs


impl(FWD, "default", _fwd)


@register_fake(FWD)
def _fwd_fake(rewards, *args):
    return _outputs(rewards)


class GroupAdvantages(NamedTuple):
    """Per completion, each (N,): the advantage, the weighted reward (NaN = not scored), and the mean and standard deviation of
    the weighted rewards of its group; ``degenerate`` (bool) where those do not differ."""

    advantages: torch.Tensor
    rewards: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    degenerate: torch.Tensor


def group_advantages(
    rewards: torch.Tensor,
    num_generations: int | None = None,
    *,
    group_sizes: Sequence[int] | torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    scale: str = "group",
    baseline: str = "mean",
    aggregation: str = "sum_then_normalize",
    eps: float = 1e-4,
    backend: str = "auto",
) -> GroupAdvantages:
    """Advantage of each completion over the others of its group.

    Equivalent, for groups of one size and rewards without NaN, to::

        r = (rewards * weights).sum(1).view(-1, num_generations)
        advantages = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + eps)

    Where the rewards of a group do not differ the advantage is exactly 0, whatever eps is and rounding makes of their mean.
    With baseline="none" it is the reward, or 0 where the rewards do not differ whose standard deviation divides it: those of
    the group, or with scale="batch" those of the batch.

    Args:
        rewards: (N,) or (N, R), floating point; NaN = not scored. A completion that no function scored has advantage 0 and
            does not enter its group's statistics.
        num_generations: G; completions of a group follow one another, N is a multiple of G.
        group_sizes: the sizes of the groups in order instead, each at least 1, N in all.
        weights: (R,), finite, default 1 each.
        scale: divide by the standard deviation (ddof 1) of the "group", of the "batch", or by nothing ("none", Dr. GRPO).
        baseline: subtract the group's "mean" (GRPO); the mean of the others ("leave_one_out", RLOO); nothing ("none"); or give
            the group's best completion alone its lead over the second best ("pass_at_k").
        aggregation: "sum_then_normalize": of the weighted sum of a completion's rewards; "normalize_then_sum" (GDPO): each
            function's rewards are normalised within the group, and their weighted sum in the batch. The latter has a scale and
            a baseline of its own, and takes only the defaults.
        eps: added to the standard deviation.
        backend: see ``vlmkernels.backend``.

    Returns:
        ``GroupAdvantages``, without gradient; fp32 (fp64 for fp64 rewards, in the reference).

    Raises:
        ValueError, TypeError: a rule above is broken; the message names argument, rule and value. Whether weights are finite is
            checked on the CPU alone (on a GPU that would wait for the device).
        NotImplementedError: the named backend does not serve these tensors.

    Source: https://arxiv.org/abs/2402.03300 (section 4.1), 2503.20783 (scale="none"), 2402.14740 (leave_one_out), 2503.19595
    (pass_at_k), 2601.05242 (normalize_then_sum).
    """
    require_tensor("rewards", rewards)
    require(rewards.is_floating_point(), "rewards", "be floating point", rewards.dtype, TypeError)
    require(rewards.dim() in (1, 2), "rewards", "be (N,) or (N, R)", tuple(rewards.shape))
    for name, value, values in (
        ("scale", scale, SCALES),
        ("baseline", baseline, BASELINES),
        ("aggregation", aggregation, AGGREGATIONS),
    ):
        require_one_of(name, value, values)
    if aggregation == "normalize_then_sum":
        for name, value, default in (("scale", scale, "group"), ("baseline", baseline, "mean")):
            require(value == default, name, f"be {default!r} with aggregation = 'normalize_then_sum'", repr(value))
    require_number("eps", eps, "be a number")
    require(eps >= 0, "eps", "be >= 0", eps)
    rewards = rewards.detach().to(torch.promote_types(rewards.dtype, torch.float32))
    rewards = rewards.unsqueeze(1) if rewards.dim() == 1 else rewards
    if weights is not None:
        require_tensor("weights", weights)
        require_shape("weights", weights, rewards.shape[1:], "one reward")
        require_device("weights", weights, rewards.device, "rewards")
        weights = weights.detach().to(rewards.dtype)
    starts, group_size = _groups(len(rewards), num_generations, group_sizes, rewards.device)
    rules = [scale, baseline, aggregation]
    fwd = torch.ops.vlmkernels.group_advantages if needs_dispatcher(rewards, weights) else _fwd
    return GroupAdvantages(*fwd(rewards, weights, starts, group_size, rules, float(eps), resolve(backend)))


def _groups(num: int, num_generations: int | None, sizes, device) -> tuple[torch.Tensor | None, int]:
    """starts and group_size of the schema."""
    if (num_generations is None) == (sizes is None):
        given = "both" if sizes is not None else "neither"
        raise ValueError(f"num_generations or group_sizes must be given, one of the two, got {given}")
    if sizes is None:
        require_number("num_generations", num_generations, "be an integer", Integral)
        require(num_generations >= 1, "num_generations", "be >= 1", num_generations)
        require(num % num_generations == 0, "num_generations", f"divide the {num} rewards", num_generations)
        return None, int(num_generations)
    sizes = sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes
    require(isinstance(sizes, Iterable), "group_sizes", "be a sequence of integers", sizes, TypeError)
    sizes = list(sizes)
    for size in sizes:
        require_number("group_sizes", size, "be integers", Integral)
    require(all(size >= 1 for size in sizes), "group_sizes", "be >= 1 each", sizes)
    require(sum(sizes) == num, "group_sizes", f"add up to the {num} rewards", f"{sizes} = {sum(sizes)}")
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    return torch.tensor(starts, dtype=torch.int32, device=device), int(max(sizes, default=1))
