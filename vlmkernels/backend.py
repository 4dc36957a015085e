"""Which backend serves a call, and why the others do not.

An op folder holds one module per implementation: ``reference``, ``triton`` and ``native`` (which serves the backends
``cpp`` and ``cuda``). Such a module has the op's functions and ``unsupported(*tensors) -> str | None``, the one place that
states what it cannot do. A backend named by the caller is used or raises ``NotImplementedError``; ``auto`` takes the first
name of ``PREFERENCE`` that serves the tensors.
"""

import importlib
import importlib.util
import os
from contextlib import contextmanager
from functools import cache

import torch

BACKENDS = ("reference", "cpp", "triton", "cuda")

# The order of "auto" on each type of device.
PREFERENCE = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}

_MODULE = {"reference": "reference", "cpp": "native", "triton": "triton", "cuda": "native"}


def _path(op: str, name: str) -> str:
    folder, module = (op, _MODULE[name]) if op != "linear_logps_fused" else ("linear_logps", f"{_MODULE[name]}_fused")
    return f"{__package__}.ops.{folder}.{module}"


_default = os.environ.get("VLMKERNELS_BACKEND", "auto")


def check_name(name: str) -> str:
    """``name``, if it is a backend or "auto"."""
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}; got {name!r}")
    return name


def resolve(name: str) -> str:
    """The backend that a call asks for: its own, or the process's where it says "auto"."""
    return check_name(_default if name == "auto" else name)


@contextmanager
def use_backend(name: str):
    """Use backend ``name`` for every call inside that does not name one itself.

    ``VLMKERNELS_BACKEND`` does the same for a whole process. The setting is global, not per thread, because autograd runs
    backward passes on threads of its own.
    """
    global _default
    previous, _default = _default, check_name(name)
    try:
        yield
    finally:
        _default = previous


@cache
def native():
    """The compiled module ``vlmkernels._C``, or the ``ImportError`` that says why there is none."""
    try:
        return importlib.import_module(f"{__package__}._C")
    except ImportError as error:
        return error


# What returns the compiled module of each native backend. The tests put the CUDA kernels built for the host here.
NATIVE = {"cpp": native, "cuda": native}


@cache
def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@cache
def _has_gpu() -> bool:
    return torch.cuda.is_available()


@cache
def _interpreted() -> bool:
    from triton import knobs

    return knobs.runtime.interpret


def missing(name: str) -> str | None:
    """Why backend ``name`` cannot serve any call in this process."""
    if name == "reference":
        return None
    if name == "triton":
        if not _installed("triton"):
            return "triton is not installed"
        if not _has_gpu() and not _interpreted():
            return "no GPU (set TRITON_INTERPRET=1 before triton is imported to run on the CPU)"
        return None
    module = NATIVE[name]()
    if isinstance(module, ImportError):
        return f"vlmkernels._C did not load ({module}); reinstall where a C++ compiler is found"
    if name == "cuda" and not module.cuda_architectures:
        return "vlmkernels._C was built without CUDA; reinstall where nvcc is found"
    if name == "cuda" and module.cuda_device_type == "cuda" and not _has_gpu():
        return "no GPU"
    return None


def device_type(name: str) -> str | None:
    """The type of device whose tensors backend ``name`` reads; None for any."""
    if name == "reference":
        return None
    if name == "triton":
        return "cpu" if _interpreted() else "cuda"
    return "cpu" if name == "cpp" else NATIVE[name]().cuda_device_type


@cache
def load(op: str, name: str):
    """The implementation of ``op`` for backend ``name``: a module, or the ``Native`` object of ``native.py``."""
    module = importlib.import_module(_path(op, name))
    return module.Native(name) if _MODULE[name] == "native" else module


def is_written(op: str, name: str) -> bool:
    """Whether ``op`` has code for backend ``name``."""
    return _installed(_path(op, name))


def why_not(op: str, name: str, *tensors: torch.Tensor) -> str | None:
    """Why backend ``name`` of ``op`` does not serve these tensors; None where it does."""
    if not is_written(op, name):
        return "not implemented"
    if reason := missing(name):
        return reason
    wanted = device_type(name)
    for tensor in tensors:
        if wanted is not None and tensor.device.type != wanted:
            return f"takes {wanted} tensors, got {tensor.device.type}"
    return load(op, name).unsupported(*tensors)


def choose(op: str, name: str, *tensors: torch.Tensor) -> str:
    """The name of the backend that serves ``op`` on ``tensors``, the first of which decides the device."""
    candidates = PREFERENCE.get(tensors[0].device.type, ("reference",)) if name == "auto" else (name,)
    reasons = []
    for candidate in candidates:
        reason = why_not(op, candidate, *tensors)
        if reason is None:
            return candidate
        reasons.append(f"{candidate}: {reason}")
    raise NotImplementedError(f"no backend serves {op}: {'; '.join(reasons)}")


def select(op: str, name: str, *tensors: torch.Tensor):
    """The implementation that serves ``op`` on ``tensors``."""
    return load(op, choose(op, name, *tensors))
