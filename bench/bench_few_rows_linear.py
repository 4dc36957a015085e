"""few_rows_linear, compared with torch.nn.functional.linear, for layers and heads of decoding steps on the CPU.

Useful bytes: the weight, read once. Errors are the greatest difference from fp64, relative to the largest value.
"""

import harness
import pytest
import torch

from vlmkernels.ops.few_rows_linear import few_rows_linear

# Rows, and inputs and outputs of the layer.
CASES = {
    "head of bench_step.py": (16, 256, 32000),
    "projection of bench_step.py": (16, 256, 256),
    "MLP of 0.5b": (16, 896, 4864),
    "head of 0.5b": (16, 896, 151936),
    "head of 0.5b, 64 rows": (64, 896, 151936),
}


@pytest.mark.skipif(harness.GPU, reason="the kernel is for the CPU")
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_few_rows_linear(benchmark, case):
    rows, width, outputs = CASES[case]
    rng = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, width, generator=rng), torch.randn(outputs, width, generator=rng)
    exact = x.double() @ weight[:1000].double().T

    def check(name, result):
        error = ((result[:, :1000].double() - exact).abs().max() / exact.abs().max()).item()
        assert error < 1e-5, f"{name} is wrong: relative error {error}"
        return f"{error:.0e}"

    providers = {
        "vlmkernels cpp": lambda: few_rows_linear(x, weight, backend="cpp"),
        "torch.nn.functional.linear": lambda: torch.nn.functional.linear(x, weight),
    }
    title = f"few_rows_linear {case}, {rows} x {width} x {outputs}, float32"
    size, flops = weight.numel() * weight.element_size(), 2 * rows * weight.numel()
    harness.compare(benchmark, harness.Case(title, providers, check, {}, limit_s=5, bytes=size, flops=flops))
