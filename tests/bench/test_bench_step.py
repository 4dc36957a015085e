"""How bench/bench_step.py summarizes the profile of a step."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def bench_step():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        spec = importlib.util.spec_from_file_location("bench_step", BENCH / "bench_step.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "bench_step", module)  # dataclasses look up the module
        spec.loader.exec_module(module)
        yield module


def event(name, device, start, end, annotation=False):
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(name=name, device_type=device, time_range=span, is_user_annotation=annotation)


def test_kernels_and_waits(bench_step):
    events = [
        event("gemm", DeviceType.CUDA, 1000.0, 3000.0),
        event("copy", DeviceType.CUDA, 2000.0, 4000.0),  # on another stream
        event("gemm", DeviceType.CUDA, 6000.0, 7000.0),
        event("Optimizer.step", DeviceType.CUDA, 0.0, 9000.0, annotation=True),
        event("aten::mm", DeviceType.CPU, 0.0, 900.0),
        event("cudaStreamSynchronize", DeviceType.CPU, 3000.0, 3500.0),
        event("cudaMemcpy", DeviceType.CPU, 5000.0, 5250.0),
        event("cudaDeviceSynchronize", DeviceType.CPU, 7000.0, 9000.0),  # of the benchmark itself
    ]
    assert bench_step.gpu_activity(events) == {"kernels": 4.0, "waits": 0.75}
    assert bench_step.gpu_activity([]) == {"kernels": 0.0, "waits": 0.0}


def test_the_events_of_a_real_profile(bench_step):
    with torch.profiler.profile() as profile, torch.profiler.record_function("a range"):
        torch.ones(8, 8).mm(torch.ones(8, 8))
    assert any(event.name == "aten::mm" for event in profile.events())
    assert bench_step.gpu_activity(profile.events()) == {"kernels": 0.0, "waits": 0.0}  # CPU tensors


def test_merged_length(bench_step):
    assert bench_step.merged_length([(3.0, 5.0), (0.0, 1.0), (0.5, 2.0), (4.0, 4.5)]) == 4.0
