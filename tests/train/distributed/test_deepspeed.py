"""Training steps with two and three processes under DeepSpeed ZeRO equal those of one process with the same global batch."""

import importlib.util

import pytest
import torch
from support.distributed import processes
from support.distributed.processes import assert_same

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="processes without a GPU"),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]
ALL = [name for name in processes.CASES if name.startswith("zero")]
LAUNCHES = {2: ["as configured", "ddp, sampled", *ALL], 3: ["as configured", "zero2", "zero2, token budget", "zero3, videos"]}
CASES = [(number, name) for number, names in LAUNCHES.items() for name in names if "sampled" not in name]


@pytest.fixture(scope="module")
def zero(launch):
    return {2: launch("zero3.yaml", 2, LAUNCHES[2]), 3: launch("zero2.yaml", 3, LAUNCHES[3])}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("number", "name"), CASES)
def test_equal_to_one_process(zero, alone, number, name):
    """Includes a checkpoint that is resumed with the same number of processes."""
    configured = {2: "zero3.yaml", 3: "zero2.yaml"}[number] if name == "as configured" else name
    assert zero[number][name]["sharded"] == configured.startswith("zero3")
    assert_same(zero[number][name], alone(name))


def test_sampling_with_unequal_lengths(zero):
    """Sampling ends on every process, and ZeRO-3 draws the same tokens as DDP."""
    assert_same(*(zero[2][name] for name in ("ddp, sampled", "zero3, sampled")))
