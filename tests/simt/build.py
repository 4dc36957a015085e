"""Builds csrc/ with its CUDA kernels compiled as C++ under simt.h: the module behind backend "cuda" where there is no GPU."""

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pybind11

SIMT = Path(__file__).resolve().parent
ROOT = SIMT.parents[1]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "simt"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
FLAGS += ["-Wno-unknown-pragmas"]  # #pragma unroll
INCLUDES = [f"-I{SIMT}", f"-I{CSRC}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]


def compiler() -> str | None:
    candidates = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    return next((path for name in candidates if (path := shutil.which(name))), None)


def _run(command: list) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(str(part) for part in command)}\n{done.stderr}")


def build(name: str, sources: list[Path], *flags: str) -> Path:
    """The shared library of ``sources``, compiled unless an earlier run did it from the same text."""
    cxx = compiler()
    if cxx is None:
        raise ImportError("no C++ compiler found (c++, g++, clang++ or CXX)")
    common = [cxx, *FLAGS, *flags, *INCLUDES]
    headers = [path for folder in (CSRC, SIMT) for path in folder.rglob("*.*h")]
    digest = hashlib.sha256(repr(common).encode())
    for path in sorted({*sources, *headers}):
        digest.update(path.read_bytes())
    CACHE.mkdir(parents=True, exist_ok=True)
    library = CACHE / f"{name}-{digest.hexdigest()[:16]}.so"
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of several test processes builds
        if not library.exists():
            for old in CACHE.glob(f"{name}-*"):
                old.unlink()
            objects = {library.with_suffix(f".{i}.o"): source for i, source in enumerate(sources)}
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(_run, ([*common, "-x", "c++", "-c", s, "-o", o] for o, s in objects.items())))
            partial = library.with_suffix(".partial")
            _run([cxx, "-shared", "-fopenmp", *objects, "-o", partial])
            for path in objects:
                path.unlink()
            partial.rename(library)
    return library


@cache
def load():
    """The module, or the ``ImportError`` that says why there is none."""
    sources = [CSRC / "bindings.cpp", *sorted((CSRC / "cpu").glob("*.cpp")), *sorted((CSRC / "cuda").glob("*.cu"))]
    defines = ['-DVLMK_CUDA_ARCHS="host"', '-DVLMK_CUDA_DEVICE_TYPE="cpu"', "-DVLMK_ISA=baseline"]
    try:
        library = build("_C", sources, *defines)
    except ImportError as error:
        return error
    loader = importlib.machinery.ExtensionFileLoader("simt._C", str(library))
    spec = importlib.util.spec_from_file_location("simt._C", library, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
