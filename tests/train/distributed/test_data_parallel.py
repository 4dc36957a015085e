"""Two and three processes under DDP and FSDP2: the training steps of one process, and errors that stop every process."""

import pytest
import torch
from support.distributed import bad_input, processes
from support.distributed.processes import assert_same

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="processes without a GPU")
CASES = [
    (number, name)
    for number, names in processes.LAUNCHES.items()
    for name in names
    if name in processes.CASES and name not in processes.SAMPLED
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("number", "name"), CASES)
def test_equal_to_one_process(launched, alone, number, name):
    """Includes a checkpoint that two processes save and three resume."""
    configured = {2: "fsdp2.yaml", 3: "ddp.yaml"}[number] if name == "as configured" else name
    assert launched[number][name]["sharded"] == configured.startswith("fsdp")
    assert_same(launched[number][name], alone(name))


def test_sampling_with_unequal_lengths(launched):
    """Sampling ends on every process, and FSDP2 draws the same tokens as DDP."""
    assert_same(*(launched[2][name] for name in ("ddp, sampled", "fsdp, sampled")))


@pytest.mark.parametrize("name", bad_input.CASES)
def test_both_processes_stop_with_the_reason(launched, name):
    _, first, second = bad_input.CASES[name]
    errors = launched[2][name]
    assert errors[0].startswith(first), errors
    assert errors[1].startswith(second), errors
