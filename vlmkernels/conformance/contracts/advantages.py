"""Contracts of group-relative advantages."""

from collections.abc import Iterator

import torch

from vlmkernels import group_advantages
from vlmkernels.conformance.adapter import Adapter
from vlmkernels.conformance.batches import AdvantageBatch
from vlmkernels.conformance.contract import Case, close, contract

PAPER = "DeepSeekMath, section 4.1 (https://arxiv.org/abs/2402.03300)"


def expected(adapter: Adapter, batch: AdvantageBatch) -> torch.Tensor:
    """Return the advantages in fp64."""
    out = group_advantages(
        batch.rewards.double(),
        group_sizes=batch.group_sizes,
        weights=batch.weights,
        scale=batch.scale,
        baseline=batch.baseline,
        eps=adapter.advantage_eps,
        backend="reference",
    )
    return out.advantages


def script(batch: AdvantageBatch) -> str:
    return f"""\
batch = {batch!r}
print("got", adapter.advantages(batch))
print("expected", expected(adapter, batch))"""


def values(adapter: Adapter) -> Iterator[Case]:
    rewards = torch.tensor([[1.0], [0.0], [0.5], [0.25], [3.0], [3.5], [-1.0], [2.0]])
    for scale in adapter.scales:
        for baseline in adapter.baselines:
            yield Case(f"{scale}-{baseline}", {"batch": AdvantageBatch(rewards, (4, 4), scale=scale, baseline=baseline)})


@contract(
    "advantages/value",
    "advantages",
    source=PAPER,
    tolerance="8 eps of fp32, times the largest advantage",
    cases=values,
    reproduce=script,
)
def value(adapter: Adapter, batch: AdvantageBatch) -> None:
    """The advantage of a completion is its reward relative to its own group."""
    right = expected(adapter, batch)
    close("advantages", adapter.advantages(batch), right, 8 * torch.finfo(torch.float32).eps * right.abs().max())
