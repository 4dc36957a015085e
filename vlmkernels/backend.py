"""The dispatcher: it selects the backend of an op that serves a call, and says why the others cannot.

``KERNELS`` and ``OTHERS`` list the backends of each op. A backend is a module with the op's functions and
``unsupported(*tensors, **settings) -> str | None``, the only place that states the limits of the backend. If the caller names a
backend, it serves the call, or the call raises ``NotImplementedError``: nothing falls back. ``"auto"`` selects the first
backend, in the order of the table, that supports the tensors.
"""

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch


class Backends(NamedTuple):
    """The backends of an op."""

    modules: dict[str, str]  # name of the backend -> its module in vlmkernels.ops; "{op}" stands for the name of the op
    order: dict[str, tuple[str, ...]]  # type of device -> the backends that "auto" tries
    otherwise: tuple[str, ...]  # the backends that "auto" tries on all other types of device


# Ops with kernels of this package.
KERNELS = Backends(
    modules={"reference": "{op}.reference", "cpp": "{op}.native", "triton": "{op}.triton", "cuda": "{op}.native"},
    order={"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")},
    otherwise=("reference",),
)

# All other ops.
OTHERS = {
    "tree_attention": Backends(
        modules={name: f"tree_attention.{name}" for name in ("parts", "flash", "flash4", "flex", "paths")},
        order={"cpu": ("parts",), "cuda": ("flash", "flex")},
        otherwise=("flex",),
    ),
    "varlen_attention": Backends(
        modules={name: f"varlen_attention.{name}_varlen" for name in ("flash_attn", "flash4", "torch", "sdpa")},
        order={"cuda": ("flash_attn", "torch", "sdpa")},
        otherwise=("sdpa",),
    ),
    "gated_delta_rule": Backends(
        modules={"reference": "gated_delta_rule.reference", "torch": "gated_delta_rule.chunks", "fla": "gated_delta_rule.fla"},
        order={"cuda": ("fla", "torch")},
        otherwise=("torch",),
    ),
    "fixed_matmul": Backends(
        modules={"tiles": "fixed_matmul.tiles", "triton": "fixed_matmul.triton"},
        order={"cuda": ("triton", "tiles")},
        otherwise=("tiles",),
    ),
    "few_rows_linear": Backends(
        modules={"cpp": "few_rows_linear.native", "torch": "few_rows_linear.torch_linear"},
        order={"cpu": ("cpp", "torch")},
        otherwise=("torch",),
    ),
    # linear_logps without logits (chunk_bytes=0).
    "linear_logps_fused": Backends(
        modules={"triton": "linear_logps.triton_fused"},
        order={},
        otherwise=("triton",),
    ),
}

BACKENDS = tuple(KERNELS.modules)
ALL_NAMES = tuple(dict.fromkeys(name for row in (KERNELS, *OTHERS.values()) for name in row.modules))


def backends_of(op: str) -> Backends:
    """Return the backends of ``op``."""
    return OTHERS.get(op, KERNELS)


def _checked_name(setting: str, name: str) -> str:
    if name != "auto" and name not in ALL_NAMES:
        raise ValueError(f"{setting} must be one of auto, {', '.join(ALL_NAMES)}; got {name!r}")
    return name


# The settings for calls with backend="auto": first those of use_backend, the innermost first, then VLMKERNELS_BACKEND. An op
# uses the first setting that names one of its backends.
_selected = tuple(_checked_name("VLMKERNELS_BACKEND", name) for name in os.environ.get("VLMKERNELS_BACKEND", "auto").split(","))


def resolve(op: str, name: str) -> str:
    """Return the setting that a call of ``op`` with ``backend=name`` uses.

    This is ``name`` itself, or for "auto" the setting of ``use_backend`` or ``VLMKERNELS_BACKEND``.

    Raises:
        ValueError: ``op`` has no backend ``name``.
    """
    known = backends_of(op).modules
    if name == "auto":
        for selected in _selected:
            if selected == "auto" or selected in known:
                return selected
    elif name not in known:
        raise ValueError(f"backend must be one of auto, {', '.join(known)}; got {name!r}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use backend ``name`` in a ``with`` block for every call that does not name a backend.

    The setting applies to the ops that have a backend of that name, and leaves the others alone: inside
    ``use_backend("flex")``, ``tree_attention`` uses "flex" and all other ops use what they used outside. The environment
    variable ``VLMKERNELS_BACKEND`` sets the backend for a whole process; it may list several names, separated by commas.

    The setting is global, not per thread, because autograd runs backward passes on its own threads.

    Args:
        name: a backend of any op, or "auto", which cancels all outer settings.

    Raises:
        ValueError: no op has a backend ``name``.
    """
    global _selected
    previous, _selected = _selected, (_checked_name("backend", name), *_selected)
    try:
        yield
    finally:
        _selected = previous


@cache
def native() -> Any:
    """Return the compiled module ``vlmkernels._C``, or the ``ImportError`` that importing it raised."""
    try:
        return importlib.import_module(f"{__package__}._C")
    except ImportError as error:
        return error


# The function that returns the compiled module of each native backend. On a machine without a GPU, the tests replace the
# function of "cuda" by one that returns CUDA kernels built for the host.
NATIVE = {"cpp": native, "cuda": native}


@cache
def installed(module: str) -> bool:
    """Whether ``module`` can be found; it is not imported."""
    return importlib.util.find_spec(module) is not None


@cache
def _has_gpu() -> bool:
    return torch.cuda.is_available()


@cache
def _interpreted() -> bool:
    """Whether Triton runs in its interpreter, on CPU tensors."""
    return bool(importlib.import_module("triton").knobs.runtime.interpret)


def missing(name: str) -> str | None:
    """Return why backend ``name`` cannot serve any call in this process; None if it can."""
    if name == "triton":
        if not installed("triton"):
            return "triton is not installed"
        if not _has_gpu() and not _interpreted():
            return "no GPU (set TRITON_INTERPRET=1 before triton is imported to run on the CPU)"
        return None
    if name not in NATIVE:
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
    """Return the type of device that backend ``name`` supports; None if each of its modules checks the device itself."""
    if name == "triton":
        return "cpu" if _interpreted() else "cuda"
    if name not in NATIVE:
        return None
    return "cpu" if name == "cpp" else str(NATIVE[name]().cuda_device_type)


@cache
def module_name(op: str, name: str) -> str | None:
    """Return the full name of the module of backend ``name`` of ``op``, without importing it; None if there is none."""
    module = backends_of(op).modules.get(name)
    if module is None:
        return None
    path = f"{__package__}.ops.{module.format(op=op)}"
    return path if installed(path) else None


@cache
def load(op: str, name: str) -> Any:
    """Import backend ``name`` of ``op``: a module, or for the native backends the ``Native`` object of ``native.py``."""
    path = module_name(op, name)
    if path is None:
        raise NotImplementedError(f"no backend serves {op}: {name}: not implemented")
    module: ModuleType = importlib.import_module(path)
    return module.Native(name) if name in NATIVE else module


def why_not(op: str, name: str, *tensors: torch.Tensor, **settings: Any) -> str | None:
    """Return why backend ``name`` of ``op`` does not support these tensors and settings; None if it does."""
    if module_name(op, name) is None:
        return "not implemented"
    reason = missing(name)
    if reason is not None:
        return reason
    wanted = device_type(name)
    if wanted is not None:
        for tensor in tensors:
            if tensor.device.type != wanted:
                return f"supports {wanted} tensors, got {tensor.device.type}"
    limit: str | None = load(op, name).unsupported(*tensors, **settings)
    return limit


def choose(op: str, name: str, *tensors: torch.Tensor, **settings: Any) -> str:
    """Return the name of the backend that serves ``op`` on ``tensors``.

    ``settings`` are passed to ``unsupported`` of the backends. The device of the first tensor selects the order of "auto".

    Raises:
        NotImplementedError: no backend supports the tensors; the message has the reason of each.
    """
    row = backends_of(op)
    candidates = row.order.get(tensors[0].device.type, row.otherwise) if name == "auto" else (name,)
    reasons = []
    for candidate in candidates:
        reason = why_not(op, candidate, *tensors, **settings)
        if reason is None:
            return candidate
        reasons.append(f"{candidate}: {reason}")
    raise NotImplementedError(f"no backend serves {op}: {'; '.join(reasons)}")


def select(op: str, name: str, *tensors: torch.Tensor) -> Any:
    """Import the backend that serves ``op`` on ``tensors``: ``choose``, then ``load``."""
    return load(op, choose(op, name, *tensors))
