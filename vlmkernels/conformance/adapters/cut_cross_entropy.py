"""Cut cross-entropy: the loss of each token from hidden states and the output head. https://github.com/apple/ml-cross-entropy"""

from typing import ClassVar

import torch
from cut_cross_entropy import linear_cross_entropy

from vlmkernels.conformance import Adapter, NotApplicable


class TorchCompile(Adapter):
    """The implementation that also works on the CPU."""

    name = "cut-cross-entropy (torch_compile)"
    packages = ("cut-cross-entropy",)
    dtypes = (torch.float32, torch.bfloat16)
    implementation = "torch_compile"

    def logps_from_hidden(
        self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        if temperature != 1 and hidden.dtype.itemsize == 2:
            raise NotApplicable("there is no temperature, and hidden states / temperature would be rounded to 16 bits")
        return -linear_cross_entropy(hidden / temperature, weight, targets, reduction="none", impl=self.implementation)


class Cut(TorchCompile):
    """The kernels in Triton."""

    name = "cut-cross-entropy"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = (torch.bfloat16, torch.float16)
    implementation = "cce"
    needs_cuda: ClassVar = {"logps_from_hidden": "the kernels are in Triton, and need an Ampere GPU or newer"}
