"""The C++ kernels as an older processor runs them: the module selects an instruction set when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlmkernels import backend

KERNELS = ("decode_attention", "few_rows_linear", "gather_logps", "group_advantages", "grpo_loss", "linear_logps")
OPS = (*KERNELS, "linear_kl", "pack_patches", "rotary", "sample_logps")
VALUES = "matches_fp64 or extreme or leading_strides or narrowed_in_place or sizes or any_strides or many_images"
VALUES += " or filters or never_a_token"


def test_instruction_set():
    """The module uses the selected instruction set. The test below runs this in each of its processes."""
    module = backend.NATIVE["cpp"]()
    assert not isinstance(module, ImportError), module
    assert os.environ.get("VLMKERNELS_CPU_ISA", module.cpu_isa) == module.cpu_isa


@pytest.mark.parametrize(("isa", "threads"), [("baseline", "1"), ("avx2", "2")])
def test_lesser_instruction_sets(isa, threads):
    """With two threads too: `make test` runs the other tests with one."""
    files = [__file__, *(str(Path(__file__).with_name(f"test_{op}.py")) for op in OPS)]
    selected = f"test_instruction_set or (cpp and ({VALUES}))"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selected, *files]
    environment = {**os.environ, "VLMKERNELS_CPU_ISA": isa, "OMP_NUM_THREADS": threads}
    environment["OMP_WAIT_POLICY"] = "passive"  # a waiting thread would spin, and take the time of other tests
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "VLMKERNELS_CPU_ISA must be at most" in done.stdout:
        pytest.skip(f"this processor does not support {isa}")
    assert done.returncode == 0, done.stdout[-3000:]
