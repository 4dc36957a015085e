"""The ops as a kernel for the Hugging Face library ``kernels``, built and loaded in a separate process.

``make setup`` installs the library outside of the environment: pip install --no-deps --target .venv/peers kernels==0.17.2
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PEERS = Path(sys.prefix) / "peers"
TEXT = (ROOT / "docs" / "integrations" / "transformers.md").read_text()
BLOCK = re.search(r"## Hugging Face kernels\n.*?```python\n(.*?)```", TEXT, flags=re.DOTALL)[1]
SCRIPT = """
import sys

import torch

kernel = vlmkernels
assert "vlmkernels" not in sys.modules
logits, targets = torch.randn(3, 5, 17, requires_grad=True), torch.randint(17, (3, 5))
expected = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
(gradient,) = torch.autograd.grad(expected.square().sum(), logits, retain_graph=True)
import vlmkernels  # beside the package, in a namespace of its own

for module, backends in ((kernel, ("auto", "triton", "reference")), (vlmkernels, ("auto",))):
    for backend in backends:
        logps = module.gather_logps(logits, targets, backend=backend)
        torch.testing.assert_close(logps, expected)
        torch.testing.assert_close(torch.autograd.grad(logps.square().sum(), logits)[0], gradient)
hidden, weight = torch.randn(3, 5, 8, requires_grad=True), torch.randn(17, 8, requires_grad=True)
results = []
for module in (kernel, vlmkernels):
    config = module.GRPOLossConfig(loss_type="grpo")
    loss = module.linear_grpo_loss(hidden, weight, targets, torch.tensor([1.0, -1.0, 0.5]), config=config).loss
    results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
torch.testing.assert_close(*results)
try:
    kernel.gather_logps(logits, targets, backend="cpp")
except NotImplementedError as error:
    assert "cpp: not implemented" in str(error), error
else:
    raise AssertionError("the kernel must not contain the compiled backend")
print("done", kernel.__name__)
"""


def test_kernel(tmp_path):
    if not (PEERS / "kernels").is_dir():
        pytest.skip(f"kernels is not in {PEERS}: pip install --no-deps --target {PEERS} kernels==0.17.2")
    subprocess.run([sys.executable, "hub/kernel.py", tmp_path], cwd=ROOT, check=True)
    assert {path.name for path in (tmp_path / "build").iterdir()} == {"torch-cpu", "torch-cuda"}
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{PEERS}", "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
    block = BLOCK.replace('Path("OUT")', f'Path("{tmp_path}"), backend="cpu"')
    command = [sys.executable, "-c", block + SCRIPT]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.stdout.startswith("done _vlmkernels_"), result.stdout + result.stderr
