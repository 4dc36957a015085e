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
FIXED = [name for name in processes.CASES if "sampled" not in name]
# The uneven: a process without images, and one with fewer parts.
OF_THREE = ["ddp", "fsdp", "fsdp, token budget"]


@pytest.fixture(scope="module", params=[2, 3])
def launched(request, tmp_path_factory):
    """The results of all cases, by one launch."""
    folder = tmp_path_factory.mktemp("processes")
    names = [*processes.CASES] if request.param == 2 else OF_THREE
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={request.param}", SCRIPT]
    done = subprocess.run([*launch, str(folder), *names], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())


def assert_same(result, other):
    assert len(result["logs"]) == len(other["logs"]) > 0
    for one, two in zip(result["logs"], other["logs"], strict=True):
        # Means over processes are not means over tokens; and every process counts its own tokens.
        names = [name for name in two if not re.search(r"time|per_second|tokens$|entropy|^kl|clip_ratio|policy_loss|ratio", name)]
        assert {name: one[name] for name in names} == pytest.approx({name: two[name] for name in names}, rel=1e-4, abs=1e-6)
    assert result["parameters"] == pytest.approx(other["parameters"], rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_equal_to_one_process(launched, tmp_path):
    for name in launched.keys() & set(FIXED):
        assert launched[name]["sharded"] == name.startswith("fsdp"), name
        assert_same(launched[name], processes.run(tmp_path, name))


def test_sampling_with_unequal_lengths(launched):
    """... ends on all processes, and draws what it draws under DDP."""
    if "fsdp, sampled" not in launched:
        pytest.skip("two processes suffice")
    assert_same(launched["fsdp, sampled"], launched["ddp, sampled"])
