"""Every Triton kernel compiles for the supported GPUs as its op launches it, and two blocks of 8 warps fit on a multiprocessor.

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
GEMM = "linear_logps_fused_kernel"
MAX_REGISTERS_OF = dict.fromkeys((GEMM, "fixed_matmul_kernel", "decode_parts_kernel"), 255)
MAX_STACK = 24  # bytes of a thread; ptxas saves up to six registers outside of the loops of some kernels
MAX_SHARED = {80: 163, 86: 99, 90: 227, 100: 227}  # KiB, of the CUDA C++ programming guide's table of compute capabilities

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    """The rows that support/triton_gate.py prints, without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, TESTS / "support" / "triton_gate.py"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_is_compiled_for_every_architecture(compiled):
    sources = sorted((TESTS.parent / "vlmkernels" / "ops").glob("*/*.py"))
    kernels = {name for path in sources for name in re.findall(r"def (\w+_kernel)\(", path.read_text())}
    assert "grpo_loss_kernel" in kernels
    assert {(row["kernel"], row["sm"]) for row in compiled if row["sm"] != 86} == {
        (kernel, sm) for kernel in kernels for sm in (80, 90, 100)
    }


def test_registers_are_not_spilled(compiled):
    assert not [row for row in compiled if row["LOCAL"] or row["STACK"] > MAX_STACK]


def test_registers(compiled):
    assert not [row for row in compiled if row["REG"] > MAX_REGISTERS_OF.get(row["kernel"], MAX_REGISTERS)]


def test_shared_memory(compiled):
    assert not [row for row in compiled if row["shared"] > 1024 * MAX_SHARED[row["sm"]]]


def test_tensor_cores(compiled):
    """16-bit products use the tensor core instructions of the GPU's generation; fp32 products, which are exact, use none."""
    used = {(row["dtype"], row["sm"], *row["tensor_cores"]) for row in compiled if row["kernel"] == GEMM}
    instructions = {80: "mma.sync", 86: "mma.sync", 90: "wgmma.mma", 100: "tcgen05.mma"}
    assert used == {("bfloat16", *item) for item in instructions.items()} | {("float32", 100)}
    assert {row["sm"] for row in compiled if row["tma"]} == {90}


def test_rows_of_fixed_matmul_do_not_depend_on_their_place(compiled):
    """There is one kernel for each dtype and K. Another alignment of a row's memory would select another kernel."""
    assert [row["sm"] for row in compiled if row["kernel"] == "fixed_matmul_kernel"].count(90) == 2
