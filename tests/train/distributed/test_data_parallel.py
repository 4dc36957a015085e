"""Two and three processes under DDP and FSDP2: the training steps of one process, and errors that stop every process."""

import pytest
import torch
from support.distributed import bad_input, dynamic, processes
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


def test_dynamic_sampling_fills_the_batch_of_each_process(launched):
    """The first process needs more rounds than the second, which waits; FSDP2 and DDP draw the same."""
    for name in dynamic.CASES:
        first, second = launched[2][name]["calls"]
        assert len(first) != len(second)
    sharded, copied = (launched[2][name] for name in reversed(dynamic.CASES))
    assert sharded["calls"] == [[call for call in calls if call[0] < 1] for calls in copied["calls"]]
    rows = [row for step in (0, 2, 4) for row in dynamic.rows_of(copied["calls"], step)]
    assert sorted(rows[: dynamic.NUM_ROWS]) == list(range(dynamic.NUM_ROWS))
    assert copied["logs"][0]["dynamic_sampling/prompts_sampled"] == len(dynamic.rows_of(copied["calls"], 0))


@pytest.mark.parametrize("checkpoint", dynamic.RESUMED)
def test_dynamic_sampling_resumes_exactly(launched, checkpoint):
    whole, step = launched[2]["ddp, dynamic sampling"], dynamic.RESUMED[checkpoint]
    resumed = whole["resumed"][checkpoint]
    assert resumed["calls"] == [[call for call in calls if call[0] >= step] for calls in whole["calls"]]
    assert resumed["same"] == [True, True]


@pytest.mark.parametrize("name", bad_input.CASES)
def test_both_processes_stop_with_the_reason(launched, name):
    _, first, second = bad_input.CASES[name]
    errors = launched[2][name]
    assert errors[0].startswith(first), errors
    assert errors[1].startswith(second), errors
