"""Tests run on the GPU if there is one. Without one, Triton runs in its interpreter and CUDA kernels under tests/simt."""

import gc
import os
import sys

import torch

# Makes cuBLAS deterministic; read when its first handle is created.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# TRL and peft would report their use from a thread, whose name lookups crash if a test changes the environment at that moment.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import pytest  # noqa: E402

from vlmkernels import backend  # noqa: E402

if not GPU:
    from simt.build import load

    backend.NATIVE["cuda"] = load


@pytest.fixture
def device() -> str:
    return "cuda" if GPU else "cpu"


@pytest.fixture(scope="session")
def server():
    """The multiprocessing context whose server forks processes that have already imported everything."""
    from support import forks

    return forks.server()


@pytest.fixture
def nan_filled(monkeypatch):
    """torch.empty returns NaN, which exposes elements that no kernel writes.

    Torch fills uninitialized memory only in deterministic mode. Operations without a deterministic implementation on a GPU
    warn and run.
    """
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=GPU)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def need():
    """need(op, backend, *tensors): skip the test, with the backend's reason, if the backend does not support the tensors."""

    def check(op: str, name: str, *tensors: torch.Tensor) -> None:
        if reason := backend.why_not(op, name, *tensors):
            pytest.skip(f"{name}: {reason}")

    return check


# The files that take longest without a GPU. Started first, they do not leave one worker with a long file at the end. The first
# two start together: nvcc uses all cores, and the processes of a distributed run, which have a time limit, wait for each other.
SLOW = (
    "ops/test_cuda_compile.py",
    "train/test_tool_training.py",
    "train/distributed/test_data_parallel.py",
    "ops/test_triton_compile.py",
    "integrations/test_trl.py",
    "integrations/test_trl_tools.py",
    "train/test_tool_options.py",
    "ops/test_linear_grpo_loss.py",
    "ops/test_grpo_loss.py",
    "ops/test_tree_attention.py",
    "ops/test_linear_logps.py",
    "bench/test_gpu_check.py",
    "ops/test_cpu_isa.py",
)


def pytest_configure(config):
    # pytest-xdist would start files with many tests first, and the slowest files have few.
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    if not GPU:
        ranks = {f"tests/{name}": rank for rank, name in enumerate(SLOW)}
        items.sort(key=lambda item: ranks.get(item.nodeid.partition("::")[0], len(ranks)))
    for item in items:
        if "gpu" in item.keywords and not GPU:
            item.add_marker(pytest.mark.skip(reason="no GPU"))


frozen_modules = 0


def freeze_modules():
    """Keep imported modules out of garbage collections: every ``train`` starts some, of half a second with all modules."""
    global frozen_modules
    if len(sys.modules) > frozen_modules:
        frozen_modules = len(sys.modules)
        gc.collect()  # what is garbage now would stay
        gc.freeze()


def pytest_collection_finish():
    freeze_modules()


def pytest_runtest_logfinish():
    freeze_modules()


def pytest_unconfigure():
    gc.unfreeze()  # Triton 3.9 prints a list of its objects that exist after the last collection


def pytest_terminal_summary(terminalreporter):
    """On a GPU, print the counts of each test file and keep them with the benchmark results of the device."""
    if not GPU or terminalreporter.config.getoption("outcomes", None):  # bench/gpu_check.py keeps the counts of all its runs
        return
    import harness

    counts: dict[str, dict[str, int]] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            row = counts.setdefault(report.nodeid.partition("::")[0], {})
            row[outcome] = row.get(outcome, 0) + 1
    path = harness.write_tests(counts)
    terminalreporter.section(f"{harness.device_name()}, commit {harness.commit()}")
    for file, row in sorted(counts.items()):
        terminalreporter.write_line(f"{file:40} " + ", ".join(f"{number} {outcome}" for outcome, number in row.items()))
    terminalreporter.write_line(f"written to {path}")
