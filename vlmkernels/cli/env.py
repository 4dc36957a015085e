"""``vlmkernels env``: show versions, devices, and which backend serves each op."""

import argparse
import os
import platform
import sys

import torch

from vlmkernels import backend
from vlmkernels.env import PACKAGES, serves, version
from vlmkernels.version import __version__


def main(argv: list[str]) -> int:
    """Print versions, devices, and for each op and backend "yes" or the reason why the backend cannot run here. Returns 0."""
    parser = argparse.ArgumentParser("vlmkernels env", description="Show versions, devices, and which backend serves each op.")
    parser.parse_args(argv)
    native = backend.native()
    print(f"vlmkernels   {__version__}")
    print(f"python       {platform.python_version()} ({sys.executable})")
    print(f"system       {platform.platform()}, {torch.get_num_threads()} threads")
    for package in PACKAGES:
        print(f"{package:<12} {version(package)}")
    if isinstance(native, ImportError):
        print(f"_C           not loaded: {native}")
    else:
        cuda = f"CUDA code for {native.cuda_architectures}" if native.cuda_architectures else "no CUDA code"
        print(f"_C           CPU code for {native.cpu_isa}, {cuda}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"GPU          {', '.join(gpus) or 'none'}")
    print(f"backend      {os.environ.get('VLMKERNELS_BACKEND', 'auto')} (VLMKERNELS_BACKEND)")
    print("\nBackends, in the order in which auto tries them:")
    for op, row in {"kernels": backend.KERNELS, **backend.OTHERS}.items():
        for device, names in {**row.order, "other devices": row.otherwise}.items():
            print(f"  {op:<18} {device:<13} {', '.join(names)}")
    print()
    for op, answers in serves().items():
        print(op)
        for name, answer in answers.items():
            print(f"  {name:<10} {answer}")
    return 0
