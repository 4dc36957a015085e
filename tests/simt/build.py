"""Build the CUDA kernels of csrc/ as C++ under simt.h: the module of backend "cuda" on a machine without a GPU."""

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
FLAGS += ["-U_FORTIFY_SOURCE"]  # its longjmp aborts when one fiber jumps to another
INCLUDES = [f"-I{SIMT}", f"-I{CSRC}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]


def compiler() -> str | None:
    candidates = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    return next((path for name in candidates if (path := shutil.which(name))), None)


def _run(command: list) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(str(part) for part in command)}\n{done.stderr}")


def _digest(*texts: bytes) -> str:
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]


def build(name: str, sources: list[Path], *flags: str) -> Path:
    """Build ``sources`` into a shared library. A file is compiled again only if its text, a header or a flag has changed."""
    cxx = compiler()
    if cxx is None:
        raise ImportError("no C++ compiler found (c++, g++, clang++ or CXX)")
    command = [cxx, *FLAGS, *flags, *INCLUDES]
    headers = [path.read_bytes() for folder in (CSRC, SIMT) for path in sorted(folder.rglob("*.*h"))]
    common = _digest(repr(command).encode(), *headers)
    objects = {CACHE / f"{name}-{s.stem}-{_digest(common.encode(), str(s).encode(), s.read_bytes())}.o": s for s in sources}
    library = CACHE / f"{name}-{_digest(repr(list(objects)).encode())}.so"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # only one of several test processes builds
        if not library.exists():
            for old in {*CACHE.glob(f"{name}-*")} - {*objects}:
                old.unlink()
            partial = CACHE / f"{name}-partial"

            def compile_one(target: Path, source: Path) -> None:
                if not target.exists():
                    part = target.with_suffix(".partial")
                    _run([*command, "-x", "c++", "-c", source, "-o", part])
                    part.rename(target)

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(compile_one, objects, objects.values()))
            _run([cxx, "-shared", "-fopenmp", *objects, "-o", partial])
            partial.rename(library)
    return library


@cache
def _load() -> object:
    sources = [CSRC / "bindings.cpp", *sorted((CSRC / "cuda").glob("*.cu"))]
    defines = ['-DVLMK_CUDA_ARCHS="host"', '-DVLMK_CUDA_DEVICE_TYPE="cpu"']
    try:
        library = build("_C", sources, *defines)
    except (ImportError, RuntimeError) as error:
        return error
    loader = importlib.machinery.ExtensionFileLoader("simt._C", str(library))
    spec = importlib.util.spec_from_file_location("simt._C", library, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def load():
    """Return the module, or an ``ImportError`` with the reason if there is no compiler.

    Raises:
        RuntimeError: a source does not compile; the message is the compiler's.
    """
    module = _load()
    if isinstance(module, RuntimeError):
        raise module
    return module
