"""The environment of a run: package versions, and which backends can run each op on this machine."""

import importlib.metadata
from pathlib import Path

import torch

from vlmkernels import backend

PACKAGES = (
    *("torch", "triton", "transformers", "trl", "liger-kernel", "flash-attn", "peft", "accelerate", "vllm"),
    *("pillow", "simplejpeg"),
)


def version(package: str) -> str:
    """Return the version of an installed package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def ops() -> list[str]:
    """List the ops that have backends: folders of vlmkernels/ops with a reference.py, and the keys of ``backend.OTHERS``."""
    kernels = (path.parent.name for path in (Path(__file__).parent / "ops").glob("*/reference.py"))
    return sorted({*kernels, *backend.OTHERS})


def samples() -> list[torch.Tensor]:
    """Return one tensor per available device and dtype, to probe backends with. Shape: (N, H, D), as attention needs."""
    kinds = [("cpu", torch.float32)]
    if torch.cuda.is_available():
        kinds += [("cuda", torch.float32), ("cuda", torch.bfloat16)]
    return [torch.zeros(1, 1, 64, dtype=dtype, device=device) for device, dtype in kinds]


def serves() -> dict[str, dict[str, str]]:
    """Return, for each op and backend, "yes" if the backend can run here, else the reason why it cannot."""
    table: dict[str, dict[str, str]] = {}
    tensors = samples()
    for op in ops():
        table[op] = {}
        for name in backend.backends_of(op).modules:
            reasons = [backend.why_not(op, name, tensor) for tensor in tensors]
            table[op][name] = next((reason for reason in reversed(reasons) if None not in reasons and reason), "yes")
    return table
