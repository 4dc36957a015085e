"""The dispatcher: which backend serves a call, and why the others do not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vlmkernels import backend, gather_logps, use_backend, varlen_attention
from vlmkernels.ops import tree_attention

CALL = """
import torch, vlmkernels
vlmkernels.gather_logps(torch.randn(3, 50), torch.tensor([1, 2, 3]))
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True)


def test_environment_names_the_backend():
    done = run(CALL, VLMKERNELS_BACKEND="flex,cuda", TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="")
    assert "NotImplementedError: no backend serves gather_logps: cuda: " in done.stderr
    done = run(CALL, VLMKERNELS_BACKEND="quick")
    assert "VLMKERNELS_BACKEND must be one of auto, reference, cpp, triton, cuda, parts, flash, " in done.stderr
    assert "; got 'quick'" in done.stderr


KERNEL_OPS = ("gather_logps", "linear_logps", "grpo_loss")


def test_use_backend_selects_for_the_ops_that_have_it():
    """Settings for different ops nest: each op uses the innermost name that is one of its backends."""
    assert {backend.resolve(op, "auto") for op in (*KERNEL_OPS, *backend.OTHERS)} == {"auto"}
    with use_backend("cpp"):
        assert backend.resolve("tree_attention", "auto") == "auto"
        with use_backend("flex"):
            assert {backend.resolve(op, "auto") for op in KERNEL_OPS} == {"cpp"}
            assert backend.resolve("tree_attention", "auto") == "flex"
            assert backend.resolve("varlen_attention", "auto") == "auto"
            assert backend.resolve("tree_attention", "parts") == "parts"
            with use_backend("reference"):
                assert {backend.resolve(op, "auto") for op in KERNEL_OPS} == {"reference"}
                assert backend.resolve("tree_attention", "auto") == "flex"
            with use_backend("auto"):
                assert {backend.resolve(op, "auto") for op in (*KERNEL_OPS, *backend.OTHERS)} == {"auto"}
        assert backend.resolve("tree_attention", "auto") == "auto"
        assert backend.resolve("gather_logps", "auto") == "cpp"
    assert backend.resolve("gather_logps", "auto") == "auto"


def test_use_backend_applies_to_attention():
    layout = tree_attention.TreeLayout.groups((2,), ((1, 1),))
    query = torch.zeros(4, 1, 8)
    with use_backend("flash"):
        with pytest.raises(NotImplementedError, match="no backend serves tree_attention: flash: supports CUDA tensors, got "):
            tree_attention.tree_attention(query, query, query, layout)
        tree_attention.tree_attention(query, query, query, layout, backend="parts")
        gather_logps(torch.zeros(1, 4), torch.tensor([2]))
    with use_backend("torch"), pytest.raises(NotImplementedError, match="no backend serves varlen_attention: torch: "):
        varlen_attention(query, query, query, torch.tensor([0, 4]).int())


def test_unknown_names_raise_with_the_full_list():
    every = ", ".join(("auto", *backend.ALL_NAMES))
    assert every.startswith("auto, reference, cpp, triton, cuda, parts, flash, flash4, flex, paths, flash_attn, ")
    with pytest.raises(ValueError, match=f"backend must be one of {every}; got 'fast'"), use_backend("fast"):
        pass
    with pytest.raises(ValueError, match="backend must be one of auto, reference, cpp, triton, cuda; got 'flex'"):
        backend.resolve("gather_logps", "flex")
    with pytest.raises(ValueError, match="backend must be one of auto, parts, flash, flash4, flex, paths; got 'cpp'"):
        backend.resolve("tree_attention", "cpp")


def test_every_backend_of_the_tables_has_a_module():
    """Each states its limits in ``unsupported`` and has the function that the op calls."""
    for op, row in backend.OTHERS.items():
        for name in row.modules:
            if backend.missing(name) is None:
                assert callable(backend.load(op, name).unsupported)
        assert {*row.otherwise, *(name for names in row.order.values() for name in names)} <= set(row.modules)


@pytest.mark.device
def test_wrong_device_is_named(device):
    if device == "cuda":
        reason = backend.why_not("gather_logps", "cpp", torch.zeros(1, 1, device="cuda"))
        assert reason == "supports cpu tensors, got cuda"
    else:
        assert backend.why_not("gather_logps", "cpp", torch.zeros(1, 1, device="meta")) == "supports cpu tensors, got meta"


def test_env_command_names_every_op_and_backend():
    done = subprocess.run([sys.executable, "-m", "vlmkernels", "env"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("gather_logps", "group_advantages", "grpo_loss", *backend.OTHERS, *backend.ALL_NAMES, "GPU"):
        assert word in done.stdout
    assert re.search("flash +supports CUDA tensors|flash +yes", done.stdout)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"CXX": "ccache g++"}, "CXX must be a C++ compiler, without arguments, got 'ccache g++'"),
        ({"PATH": "", "VLMKERNELS_CUDA": "1"}, "VLMKERNELS_CUDA=1 needs a C++ compiler"),
    ],
)
def test_the_build_does_not_fall_back_to_pure_python_if_a_compiler_is_named(variables, message):
    pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    environment = {name: value for name, value in os.environ.items() if name != "CXX"} | variables
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr
