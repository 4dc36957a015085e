"""Contracts of group-relative advantages."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from vlmkernels.conformance.adapter import Adapter
from vlmkernels.conformance.batches import AdvantageBatch, construct
from vlmkernels.conformance.contract import Case, Violation, close, contract
from vlmkernels.conformance.objective import expected_advantages

PAPERS = (
    "DeepSeekMath, section 4.1 (https://arxiv.org/abs/2402.03300); Dr. GRPO for scale none (2503.20783); RLOO for"
    " leave_one_out (2402.14740); pass@k (2503.19595)"
)
ROUNDING = "8 eps of fp32, times the largest reward divided as the advantages are"


def script(batch: AdvantageBatch) -> str:
    return f"""\
batch = {batch!r}
print("got", adapter.advantages(batch))
print("expected", expected_advantages(batch, adapter.advantage_eps, adapter.advantage_ddof).values)"""


def exact(adapter: Adapter, batch: AdvantageBatch) -> None:
    """Check the advantages against the oracle."""
    right = expected_advantages(batch, adapter.advantage_eps, adapter.advantage_ddof)
    largest = (batch.rewards.double().nan_to_num().abs() * torch.tensor(batch.weights).abs()).sum(1).amax()
    # Leaving one out multiplies by n / (n - 1).
    allowed = 8 * torch.finfo(torch.float32).eps * (2 * largest / right.divisor + right.values.abs())
    close("advantages", adapter.advantages(batch), right.values, allowed)


def batches(adapter: Adapter, name: str, rewards: Sequence[Sequence[float]], sizes: Sequence[int]) -> Iterator[Case]:
    """Yield a batch with every scale and baseline."""
    for scale in adapter.scales:
        for baseline in adapter.baselines:
            batch = AdvantageBatch(torch.tensor(rewards), tuple(sizes), scale=scale, baseline=baseline)
            yield Case(f"{scale}-{baseline}{name and '-'}{name}", {"batch": batch})


# Two groups that are far apart, so that a reward of another group shows.
FAR_APART = [[1.0], [0.0], [0.5], [0.25], [30.0], [35.0], [-10.0], [20.0]]


@contract(
    "advantages/value",
    "advantages",
    source=PAPERS,
    tolerance=ROUNDING,
    cases=lambda adapter: batches(adapter, "", FAR_APART, (4, 4)),
    reproduce=script,
)
def value(adapter: Adapter, batch: AdvantageBatch) -> None:
    """The advantage of a completion is its reward relative to its own group."""
    exact(adapter, batch)


@contract(
    "advantages/unequal_groups",
    "advantages",
    source=PAPERS,
    tolerance=ROUNDING,
    cases=lambda adapter: batches(adapter, "", FAR_APART, (3, 5)) if adapter.unequal_groups else (),
    reproduce=script,
)
def unequal_groups(adapter: Adapter, batch: AdvantageBatch) -> None:
    """Groups may have different numbers of completions."""
    exact(adapter, batch)


NAN = float("nan")
UNSCORED = {
    "one": [[1.0], [NAN], [0.5], [0.25], [30.0], [35.0], [-10.0], [20.0]],
    "all_but_one": [[1.0], [NAN], [NAN], [NAN], [30.0], [35.0], [-10.0], [20.0]],
    "group": [[NAN], [NAN], [NAN], [NAN], [30.0], [35.0], [-10.0], [20.0]],
}


def unscored_cases(adapter: Adapter) -> Iterator[Case]:
    for name, rewards in UNSCORED.items() if adapter.unscored else ():
        yield from batches(adapter, name, rewards, (4, 4))


@contract(
    "advantages/unscored",
    "advantages",
    source="TRL's reward functions, which return None for completions to which they do not apply: a completion without a reward"
    " is no evidence about the others of its group",
    tolerance=ROUNDING,
    cases=unscored_cases,
    reproduce=script,
)
def unscored(adapter: Adapter, batch: AdvantageBatch) -> None:
    """A completion that is not scored (NaN) has advantage 0 and does not enter the statistics of its group."""
    exact(adapter, batch)


def several_cases(adapter: Adapter) -> Iterator[Case]:
    rewards = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 1.0], [0.25, -1.0], [3.0, 8.0], [3.5, 0.0], [-1.0, 4.0], [2.0, 6.0]])
    for scale in adapter.scales if adapter.several_rewards else ():
        batch = AdvantageBatch(rewards, (4, 4), weights=(1.0, 0.25), scale=scale, baseline=adapter.baselines[0])
        yield Case(scale, {"batch": batch})
        if adapter.unscored:
            partly = torch.where(torch.tensor([[1, 0], *[[1, 1]] * 7]).bool(), rewards, torch.nan)
            yield Case(f"{scale}-unscored", {"batch": replace(batch, rewards=partly)})


@contract(
    "advantages/several_rewards",
    "advantages",
    source=PAPERS,
    tolerance=ROUNDING,
    cases=several_cases,
    reproduce=script,
)
def several_rewards(adapter: Adapter, batch: AdvantageBatch) -> None:
    """The reward of a completion is the weighted sum of the rewards that it has."""
    exact(adapter, batch)


def relative(adapter: Adapter) -> list[str]:
    """Return the baselines that make equal rewards worthless."""
    return [baseline for baseline in adapter.baselines if baseline != "none"]


def equal_cases(adapter: Adapter, *rewards: float) -> Iterator[Case]:
    for reward in rewards:
        both = torch.tensor([[reward]] * 8 + [[0.0], [0.5], [0.25], [1.0]] * 2)
        for scale in adapter.scales:
            for baseline in relative(adapter):
                batch = AdvantageBatch(both, (8, 8), scale=scale, baseline=baseline)
                yield Case(f"{scale}-{baseline}-{reward}", {"batch": batch})


def zeros(adapter: Adapter, batch: AdvantageBatch, tolerance: float = 0.0) -> None:
    """Check that the advantages of the first group are 0."""
    got = adapter.advantages(batch)[: batch.group_sizes[0]]
    close("advantages of the first group", got, torch.zeros(len(got)), tolerance)


@contract(
    "advantages/equal_rewards",
    "advantages",
    source=PAPERS,
    tolerance="none: the mean of equal rewards is exact",
    cases=lambda adapter: equal_cases(adapter, 1.0),
    reproduce=script,
)
def equal_rewards(adapter: Adapter, batch: AdvantageBatch) -> None:
    """A group with equal rewards has advantages of exactly 0."""
    zeros(adapter, batch)


@contract(
    "advantages/equal_rewards_rounded",
    "advantages",
    source="Adam divides the gradient by its size: if no group has a signal, it scales a rounding error up to a full step",
    tolerance="4 eps of fp32, times the reward (for scale batch divided by its standard deviation): rounding may remain, but it"
    " is not divided by the constant that is added to a standard deviation of 0",
    cases=lambda adapter: equal_cases(adapter, 0.1, 0.7),
    reproduce=script,
)
def equal_rewards_rounded(adapter: Adapter, batch: AdvantageBatch) -> None:
    """A group with equal rewards has advantages of 0 up to rounding, also if the mean of these rewards is rounded."""
    rounding = 4 * torch.finfo(torch.float32).eps * float(batch.rewards[0, 0])
    if batch.scale == "batch":
        rounding /= float(expected_advantages(batch, adapter.advantage_eps, adapter.advantage_ddof).divisor[0])
    zeros(adapter, batch, rounding)


def single_cases(adapter: Adapter) -> Iterator[Case]:
    sizes = (1, 3) if adapter.unequal_groups else (1, 1, 1, 1)
    for scale in adapter.scales:
        for baseline in relative(adapter):
            batch = AdvantageBatch(torch.tensor([[3.0], [0.0], [0.5], [1.0]]), sizes, scale=scale, baseline=baseline)
            yield Case(f"{scale}-{baseline}", {"batch": batch})


@contract(
    "advantages/group_of_one",
    "advantages",
    source="the mean of one reward is this reward; RLOO has no baseline for it, so that only a finite number is required",
    tolerance="none",
    cases=single_cases,
    reproduce=script,
)
def group_of_one(adapter: Adapter, batch: AdvantageBatch) -> None:
    """A completion alone in its group has a finite advantage, and advantage 0 if the baseline is the mean of the group."""
    if batch.baseline == "mean":
        zeros(adapter, batch)
    finite(adapter, batch)


def finite(adapter: Adapter, batch: AdvantageBatch) -> None:
    got = adapter.advantages(batch)
    if not got.isfinite().all():
        raise Violation(f"advantages are {got.tolist()}, expected finite numbers")


@contract(
    "advantages/offset",
    "advantages",
    source="the advantages do not depend on a number that is added to all rewards",
    tolerance=ROUNDING,
    cases=lambda adapter: batches(adapter, "", [[1e6 + x] for x in (0.0, 64.0, 16.0, -32.0)] * 2, (4, 4)),
    reproduce=script,
)
def offset(adapter: Adapter, batch: AdvantageBatch) -> None:
    """Rewards with a large mean and a small spread have the right advantages."""
    exact(adapter, batch)


def order_script(batch: AdvantageBatch, order: Sequence[int]) -> str:
    return f"""\
batch = {batch!r}
order = {[*order]}
other = {construct(batch, rewards="batch.rewards[order]")}
print("got", adapter.advantages(other))
print("expected", adapter.advantages(batch)[order])"""


def order_cases(adapter: Adapter) -> Iterator[Case]:
    for name, order in (("within_groups", (2, 0, 3, 1, 5, 4, 7, 6)), ("groups", (4, 5, 6, 7, 0, 1, 2, 3))):
        for each in batches(adapter, name, FAR_APART, (4, 4)):
            yield Case(each.id, {**each.arguments, "order": order})


@contract(
    "advantages/order",
    "advantages",
    source="a group is a set",
    tolerance="twice the rounding error of advantages/value, because both sides are the adapter's",
    cases=order_cases,
    reproduce=order_script,
)
def order(adapter: Adapter, batch: AdvantageBatch, order: Sequence[int]) -> None:
    """Another order of the groups, or of the completions in a group, permutes the advantages."""
    index = list(order)
    expected = expected_advantages(batch, adapter.advantage_eps, adapter.advantage_ddof)
    largest = batch.rewards.double().abs().amax()
    allowed = 16 * torch.finfo(torch.float32).eps * (2 * largest / expected.divisor + expected.values.abs())[index]
    got = adapter.advantages(replace(batch, rewards=batch.rewards[index]))
    close("advantages", got, adapter.advantages(batch)[index], allowed)
