"""The package without its optional parts, each in a fresh process."""

import os
import subprocess
import sys

import pytest
import torch

from vlmkernels import backend

# None in sys.modules is how Python marks a module that cannot be imported.
BLOCK = """
import sys
sys.modules.update(dict.fromkeys({blocked}))
"""

CALL = """
import torch, vlmkernels
x = torch.randn(3, 50, requires_grad=True)
t = torch.tensor([1, 2, 3])
vlmkernels.gather_logps(x, t).sum().backward()
torch.testing.assert_close(x.grad, torch.eye(50)[t] - x.softmax(-1).detach())
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.mark.parametrize(
    "blocked", [["triton"], ["vlmkernels._C"], ["transformers"], ["triton", "vlmkernels._C", "transformers"]], ids=str
)
def test_works_without(blocked):
    done = run(BLOCK.format(blocked=blocked) + CALL)
    assert done.returncode == 0, done.stderr


def test_a_missing_backend_says_why():
    code = BLOCK.format(blocked=["vlmkernels._C", "triton"]) + CALL.replace("t)", 't, backend="cpp")')
    assert "NotImplementedError: no backend serves gather_logps: cpp: vlmkernels._C did not load" in run(code).stderr
    code = code.replace('"cpp"', '"triton"')
    assert "NotImplementedError: no backend serves gather_logps: triton: triton is not installed" in run(code).stderr


def test_importing_loads_neither_triton_nor_the_extension():
    code = (
        "import sys, torch; before = set(sys.modules); import vlmkernels; new = set(sys.modules) - before;"
        "print(sorted(n for n in new if n.split('.')[0] in ('triton', 'transformers') or n == 'vlmkernels._C'))"
    )
    assert run(code).stdout.strip() == "[]"


def test_environment_names_the_backend():
    done = run(CALL, VLMKERNELS_BACKEND="cuda", TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="")
    assert "NotImplementedError: no backend serves gather_logps: cuda: " in done.stderr
    done = run(CALL, VLMKERNELS_BACKEND="quick")
    assert "backend must be one of auto, reference, cpp, triton, cuda; got 'quick'" in done.stderr


@pytest.mark.device
def test_wrong_device_is_named(device):
    if device == "cuda":
        reason = backend.why_not("gather_logps", "cpp", torch.zeros(1, 1, device="cuda"))
        assert reason == "takes cpu tensors, got cuda"
    else:
        assert backend.why_not("gather_logps", "cpp", torch.zeros(1, 1, device="meta")) == "takes cpu tensors, got meta"


def test_env_command_names_every_op_and_backend():
    done = run("from vlmkernels.env import main; main()")
    assert done.returncode == 0, done.stderr
    for word in ("gather_logps", "group_advantages", "grpo_loss", *backend.BACKENDS, "torch", "GPU"):
        assert word in done.stdout
