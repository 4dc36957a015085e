import pytest
import torch

from vlmkernels.ops import linear_kl as linear_kl_module
from vlmkernels.ops import linear_logps as linear_logps_module
from vlmkernels.ops.linear_logps import sweep


@pytest.fixture
def fp32_results(monkeypatch):
    """GEMMs of 16-bit operands return fp32 on the CPU too, as they do in CUDA."""
    if torch.cuda.is_available():
        return
    mm = torch.mm

    def widening(a, b, *, out_dtype=None, out=None):
        return mm(a, b) if out is None else mm(a, b, out=out) if out_dtype is None else out.copy_(mm(a.float(), b.float()))

    monkeypatch.setattr(torch, "mm", widening)
    monkeypatch.setattr(sweep, "result_dtype", lambda hidden: torch.promote_types(hidden.dtype, torch.float32))
    for module in (linear_logps_module, linear_kl_module):
        monkeypatch.setattr(module, "result_dtype", sweep.result_dtype)
