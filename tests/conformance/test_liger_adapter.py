"""The adapters of Liger find what docs/conformance/liger.md reports, and our patch passes."""

import pytest
import torch

from vlmkernels.conformance import load, run
from vlmkernels.conformance.contract import ERROR, FAIL, PASS

pytest.importorskip("liger_kernel")

REPORTED = {
    "LigerFusedLinear": {"loss/empty[luspo-token-one_token]"},
    "LigerScaledCrossEntropy": {"hidden/precision[bfloat16-0.7]"},
    "PatchedFusedLinear": set(),
    "PatchedTriton": set(),
    "PatchedScaledCrossEntropy": set(),
}


@pytest.mark.parametrize("name", REPORTED)
def test_faults_of_liger_and_of_our_patch(name):
    adapter = load(f"liger:{name}")
    results = run(adapter, "loss/empty") + run(adapter, "hidden/precision")
    assert {f"{each.contract}[{each.case}]" for each in results if each.status in (FAIL, ERROR)} == REPORTED[name]
    assert any(each.status == PASS for each in results)


def test_what_needs_a_gpu_is_not_run():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    results = run(load("liger:LigerTriton"), "loss/empty")
    assert {(each.status, each.message) for each in results} == {("needs CUDA", "Liger's Triton kernels need a GPU")}
