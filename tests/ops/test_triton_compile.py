"""Every Triton kernel compiles for the supported GPUs, almost without spills, and two blocks of 8 warps fit on an SM.

The exceptions are GEMMs, whose accumulators fill the registers: one block of linear_logps_fused fits, and three of the 4 warps
of fixed_matmul; and decode_attention, whose blocks have 4 warps.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
MAX_REGISTERS = 128
MAX_STACK = 16  # bytes of a thread: none with Triton 3.8, up to 16 in five kernels with Triton 3.9
GEMM = "linear_logps_fused_kernel"
GEMMS = (GEMM, "fixed_matmul_kernel")
DECODE = "decode_parts_kernel"
MAX_SHARED = {80: 163, 86: 99, 90: 227, 100: 227}  # KiB, of the CUDA C++ programming guide's table of compute capabilities

pytest.importorskip("triton")


def rows_of(program: str, cache: Path) -> list[dict]:
    """What a program of tests/support prints, without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run([sys.executable, TESTS / "support" / program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    return rows_of("compile_gate.py", tmp_path_factory.mktemp("triton"))


def test_what_is_launched_compiles(tmp_path):
    """The launchers pass arguments that the kernels accept, also a second time, and that fit on a GPU."""
    launched = rows_of("triton_launches.py", tmp_path)
    assert {row["kernel"] for row in launched} >= {
        "decode_merge_kernel",
        "fixed_matmul_kernel",
        "grpo_loss_finish_kernel",
        "linear_kl_kernel",
        "merge_kernel",
        "sample_draw_kernel",
    }
    # One for each dtype and K: a row of its result does not depend on the place of the rows in memory.
    assert [row["kernel"] for row in launched].count("fixed_matmul_kernel") == 2
    assert not [row for row in launched if row["LOCAL"] or row["shared"] > 1024 * MAX_SHARED[90]]


def test_registers_are_not_spilled(compiled):
    spilled = [row for row in compiled if row["STACK"] > MAX_STACK or row["LOCAL"]]
    assert not spilled


def test_registers(compiled):
    over = [row for row in compiled if row["REG"] > MAX_REGISTERS and row["kernel"] not in (*GEMMS, DECODE)]
    assert not over


def test_shared_memory(compiled):
    over = [row for row in compiled if row["shared"] > 1024 * MAX_SHARED[row["sm"]]]
    assert not over


def test_tensor_cores(compiled):
    """16-bit products use the tensor core instructions of the GPU's generation; fp32 products, which are exact, use none."""
    used = {(row["dtype"], row["sm"], *row["tensor_cores"]) for row in compiled if row["kernel"] == GEMM}
    instructions = {80: "mma.sync", 86: "mma.sync", 90: "wgmma.mma", 100: "tcgen05.mma"}
    assert used == {("bf16", *item) for item in instructions.items()} | {("fp32", 100)}
    assert {row["sm"] for row in compiled if row["tma"]} == {90}


def test_every_kernel_is_compiled_for_every_architecture(compiled):
    sources = sorted((TESTS.parent / "vlmkernels" / "ops").glob("*/*.py"))
    kernels = {name for path in sources for name in re.findall(r"def (\w+_kernel)\(", path.read_text())}
    assert len(kernels) >= 3
    assert {(row["kernel"], row["sm"]) for row in compiled if row["sm"] != 86} == {
        (kernel, sm) for kernel in kernels for sm in (80, 90, 100)
    }
