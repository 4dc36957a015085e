import importlib.util
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from vlmkernels.ops import linear_kl as linear_kl_module
from vlmkernels.ops import linear_logps as linear_logps_module
from vlmkernels.ops.linear_logps import sweep


def patch_triton_once():
    """Triton's interpreter patches triton.language anew in each call of a device function, which takes most of its time."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    @cache
    def patch_once(fn):
        patch(fn)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patch_once


if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    patch_triton_once()


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
