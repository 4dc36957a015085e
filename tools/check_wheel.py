"""Check an installed wheel: the compiled module loads, contains CUDA code and computes; run outside of the repository."""

import sys
from pathlib import Path

import torch

import vlmkernels
from vlmkernels import _C, gather_logps

assert Path(vlmkernels.__file__).is_relative_to(sys.prefix), f"vlmkernels is not from the wheel: {vlmkernels.__file__}"
assert _C.cuda_architectures, "the wheel has no CUDA code"
logits, targets = torch.randn(4, 1000, requires_grad=True), torch.randint(1000, (4,))
expected = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
logps = gather_logps(logits, targets, backend="cpp")
torch.testing.assert_close(logps, expected)
gradients = [torch.autograd.grad(x.square().sum(), logits)[0] for x in (logps, expected)]
torch.testing.assert_close(*gradients)
print(f"gather_logps of {Path(_C.__file__).name} agrees with torch; CUDA code for {_C.cuda_architectures}")
