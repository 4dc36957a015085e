"""The ops need torch only. Each test runs in a new process with other packages blocked."""

import os
import subprocess
import sys

import pytest

TRAINER = ["transformers", "datasets", "peft", "PIL", "accelerate", "tokenizers", "huggingface_hub", "torchvision"]

# None in sys.modules is how Python marks a module that cannot be imported.
BLOCK = """
import sys
sys.modules.update(dict.fromkeys({blocked}))
"""

# Imports all modules of the ops, without those in Triton if triton is blocked, and without the rules for PIL images if PIL is.
IMPORT = """
import importlib, pkgutil
import vlmkernels, vlmkernels.ops
for module in pkgutil.walk_packages(vlmkernels.ops.__path__, "vlmkernels.ops."):
    needs_triton = "triton" in module.name.rpartition(".")[2] or module.name.endswith("tree_attention.merge")
    needs_pil = module.name.endswith("decode_image.pixels")
    needs = [name for name, is_needed in (("triton", needs_triton), ("PIL", needs_pil)) if is_needed]
    if all(sys.modules.get(name, True) for name in needs):
        importlib.import_module(module.name)
"""

CALLS = """
import torch
logits = torch.randn(3, 50, requires_grad=True)
targets = torch.tensor([1, 2, 3])
vlmkernels.gather_logps(logits, targets).sum().backward()
torch.testing.assert_close(logits.grad, torch.eye(50)[targets] - logits.softmax(-1).detach())

logps = torch.zeros(2, 4, requires_grad=True)
loss, metrics = vlmkernels.grpo_loss(logps, torch.tensor([1.0, 3.0]), num_items=8)
loss.backward()
torch.testing.assert_close(loss, torch.tensor(-2.0))
torch.testing.assert_close(logps.grad, torch.tensor([[-0.125] * 4, [-0.375] * 4]))

if sys.modules.get("PIL", True) is None:
    from vlmkernels import backend
    for name in ("simplejpeg", "pillow"):
        assert backend.why_not("decode_image", name, torch.empty(0)) == "pillow is not installed"

packed = vlmkernels.pack_patches([torch.zeros(3, 28, 56, dtype=torch.uint8)], patch_size=14, mean=None, std=None)
assert packed.pixel_values.shape == (8, 3 * 2 * 14 * 14) and packed.image_grid_thw.tolist() == [[1, 2, 4]]
"""


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], env=dict(os.environ), capture_output=True, text=True)


@pytest.mark.parametrize(
    "blocked",
    [TRAINER, ["triton"], ["vlmkernels._C"], [*TRAINER, "numpy", "triton", "vlmkernels._C"]],
    ids=["trainer", "triton", "_C", "all"],
)
def test_ops_work_without(blocked):
    done = run(BLOCK.format(blocked=blocked) + IMPORT + CALLS)
    assert done.returncode == 0, done.stderr


def test_a_missing_backend_says_why():
    code = """
import torch, vlmkernels
for backend in ("cpp", "triton"):
    try:
        vlmkernels.gather_logps(torch.zeros(3, 50), torch.tensor([1, 2, 3]), backend=backend)
    except NotImplementedError as error:
        print(error)
"""
    printed = run(BLOCK.format(blocked=["vlmkernels._C", "triton"]) + code).stdout
    assert "no backend serves gather_logps: cpp: vlmkernels._C did not load" in printed
    assert "no backend serves gather_logps: triton: triton is not installed" in printed


def test_importing_loads_torch_only():
    """Neither triton nor the extension nor a package of the trainer is loaded by ``import vlmkernels``."""
    code = (
        "import sys, torch; before = set(sys.modules); import vlmkernels; new = set(sys.modules) - before;"
        f"blocked = {{'triton', *{TRAINER}}};"
        "print(sorted(n for n in new if n.split('.')[0] in blocked or n == 'vlmkernels._C'))"
    )
    assert run(code).stdout.strip() == "[]"
