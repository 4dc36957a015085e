"""Steps of two and three processes under DDP and FSDP2, against one process with the same global batch."""

import json
import re
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="processes without a GPU")
SCRIPT = str(Path(__file__).with_name("processes.py"))
SAMPLED = ("ddp, sampled", "fsdp, sampled")
LAUNCHES = {
    2: [name for name in processes.CASES if name != "fsdp, resumed"],
    3: ["ddp", "fsdp", "fsdp, token budget", "fsdp, resumed"],  # one without images, one with fewer parts; what two saved
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The results of all cases, by the number of processes."""
    folder, results = tmp_path_factory.mktemp("processes"), {}
    for number, names in LAUNCHES.items():
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}", SCRIPT]
        done = subprocess.run([*launch, str(folder), *names], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        results[number] = json.loads((folder / "results.json").read_text())
    return results


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The results of one process."""
    return {name: processes.run(tmp_path_factory.mktemp("one"), name) for name in processes.CASES if name not in SAMPLED}


def assert_same(result, other):
    assert len(result["logs"]) == len(other["logs"]) > 0
    for one, two in zip(result["logs"], other["logs"], strict=True):
        # Means over processes are not means over tokens; every process counts its own tokens and runs its own prompts.
        own = r"time|per_second|tokens$|_run$|entropy|^kl|clip_ratio|policy_loss|ratio/m"
        names = [name for name in two if not re.search(own, name)]
        assert {name: one[name] for name in names} == pytest.approx({name: two[name] for name in names}, rel=1e-4, abs=1e-6)
    assert result["parameters"] == pytest.approx(other["parameters"], rel=1e-4)


CASES = [(number, name) for number, names in LAUNCHES.items() for name in names if name not in SAMPLED]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("number", "name"), CASES)
def test_equal_to_one_process(launched, alone, number, name):
    """Saved by two and resumed by three included."""
    assert launched[number][name]["sharded"] == name.startswith("fsdp")
    assert_same(launched[number][name], alone[name])


def test_sampling_with_unequal_lengths(launched):
    """... ends on all processes, and draws what it draws under DDP."""
    assert_same(*(launched[2][name] for name in SAMPLED))
