"""Steps of two and three processes under DDP and FSDP2, against one process with the same global batch."""

import re

import processes
import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="processes without a GPU")
CASES = [
    (number, name)
    for number, names in processes.LAUNCHES.items()
    for name in names
    if name in processes.CASES and name not in processes.SAMPLED
]


def assert_same(result: dict, other: dict) -> None:
    assert len(result["logs"]) == len(other["logs"]) > 0
    for one, two in zip(result["logs"], other["logs"], strict=True):
        # Means over processes are not means over tokens; every process counts its own tokens and runs its own prompts.
        own = r"time|per_second|tokens$|_run$|entropy|^kl|clip_ratio|policy_loss|ratio/m"
        names = [name for name in two if not re.search(own, name)]
        assert {name: one[name] for name in names} == pytest.approx({name: two[name] for name in names}, rel=1e-4, abs=1e-6)
    assert result["parameters"] == pytest.approx(other["parameters"], rel=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("number", "name"), CASES)
def test_equal_to_one_process(launched, alone, number, name):
    """Saved by two and resumed by three included."""
    configured = {2: "fsdp2.yaml", 3: "ddp.yaml"}[number] if name == "as configured" else name
    assert launched[number][name]["sharded"] == configured.startswith("fsdp")
    assert_same(launched[number][name], alone(name))


def test_sampling_with_unequal_lengths(launched):
    """... ends on all processes, and draws what it draws under DDP."""
    assert_same(*(launched[2][name] for name in ("ddp, sampled", "fsdp, sampled")))
