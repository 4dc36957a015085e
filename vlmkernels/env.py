"""What ``vlmkernels env`` prints: versions, devices, and which backend serves each op and why the others do not."""

import importlib.metadata
import platform
import sys
from pathlib import Path

import torch

from vlmkernels import backend
from vlmkernels.version import __version__

PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "flash-attn", "peft", "accelerate", "vllm")


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def ops() -> list[str]:
    """The ops that are registered with backends: the folders of vlmkernels/ops that have a reference."""
    return sorted(path.parent.name for path in (Path(__file__).parent / "ops").glob("*/reference.py"))


def sample(name: str | None) -> torch.Tensor:
    """A tensor of the kind that backend ``name`` takes."""
    device = backend.device_type(name) or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.zeros(1, 1, device=device)


def serves() -> dict[str, dict[str, str]]:
    """Per op and backend "yes", or the reason why not."""
    table = {}
    for op in ops():
        table[op] = {}
        for name in backend.BACKENDS:
            reason = backend.missing(name) or backend.why_not(op, name, sample(name))
            table[op][name] = reason or "yes"
    return table


def main() -> int:
    native = backend.native()
    print(f"vlmkernels  {__version__}")
    print(f"python      {platform.python_version()} ({sys.executable})")
    print(f"system      {platform.platform()}, {torch.get_num_threads()} threads")
    for package in PACKAGES:
        print(f"{package:<11} {version(package)}")
    if isinstance(native, ImportError):
        print(f"_C          not loaded: {native}")
    else:
        print(f"_C          CPU code for {native.cpu_isa}, CUDA code for {native.cuda_architectures or 'nothing'}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"GPU         {', '.join(gpus) or 'none'}")
    print(f"backend     {backend.resolve('auto')} (VLMKERNELS_BACKEND)")
    print("\nBackends, in the order that auto tries them:")
    for device, names in backend.PREFERENCE.items():
        print(f"  {device:<5} {', '.join(names)}")
    print()
    for op, row in serves().items():
        print(op)
        for name, answer in row.items():
            print(f"  {name:<10} {answer}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
