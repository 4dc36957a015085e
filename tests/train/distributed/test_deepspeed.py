"""Steps of two and three processes under DeepSpeed's ZeRO, against one process with the same global batch."""

import importlib.util

import processes
import pytest
import torch
from test_data_parallel import assert_same

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
    """Resumed by as many processes included."""
    configured = {2: "zero3.yaml", 3: "zero2.yaml"}[number] if name == "as configured" else name
    assert zero[number][name]["sharded"] == configured.startswith("zero3")
    assert_same(zero[number][name], alone(name))


def test_sampling_with_unequal_lengths(zero):
    """... ends on all processes, and draws what it draws under DDP."""
    assert_same(*(zero[2][name] for name in ("ddp, sampled", "zero3, sampled")))
