"""Build the extension module vlmkernels._C from csrc/. The build does not need torch. Metadata is in pyproject.toml.

The module contains C++ code if a C++ compiler is found, and CUDA code if nvcc is found as well. Without a compiler the package
installs as pure Python. Environment variables:

    VLMKERNELS_CUDA         auto (default): build CUDA code if nvcc is found; 0: never; 1: fail if nvcc is not found
    VLMKERNELS_CUDA_ARCHS   GPU architectures, for example "80;90a"; default: all of DEFAULT_ARCHS that nvcc supports
    CXX                     C++ compiler
    CUDA_HOME               folder of the CUDA toolkit, which has bin/nvcc
"""

import os
import platform
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
X86 = platform.machine().lower() in ("x86_64", "amd64")
# Each file of csrc/cpu is compiled once per instruction set, and bindings.cpp selects one at run time. The baseline is linked
# first: if several objects define the same inline function, the linker keeps the first copy, and every processor must run it.
ISAS = {"baseline": []}
if X86:
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = [
        *ISAS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512",
    ]  # fmt: skip
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
CXX_FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # false positives in the AVX-512 header of GCC 12
DEFAULT_ARCHS = ("80", "90a", "100a")


def find_cxx() -> str | None:
    if "CXX" in os.environ and shutil.which(os.environ["CXX"]) is None:
        raise SystemExit(
            f"CXX must be a C++ compiler, without arguments, got {os.environ['CXX']!r}, which is not an executable"
        )
    candidates = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    return next((path for name in candidates if (path := shutil.which(name))), None)


def find_nvcc() -> str | None:
    mode = os.environ.get("VLMKERNELS_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"VLMKERNELS_CUDA must be auto, 0 or 1, got {mode!r}")
    home = os.environ.get("CUDA_HOME")
    nvcc = None if mode == "0" else shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if mode == "1" and nvcc is None:
        raise SystemExit("VLMKERNELS_CUDA=1 needs nvcc, which is neither on PATH nor in CUDA_HOME/bin")
    return nvcc


def cuda_archs(nvcc: str) -> list[str]:
    if "VLMKERNELS_CUDA_ARCHS" in os.environ:
        return os.environ["VLMKERNELS_CUDA_ARCHS"].split(";")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return [arch for arch in DEFAULT_ARCHS if f"compute_{arch.rstrip('a')}" in known]


def gencode(archs: list[str]) -> list[str]:
    """Machine code for every architecture, and PTX of the first portable one, which later GPUs compile at load time."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    portable = next((arch for arch in archs if arch.isdigit()), None)
    return flags + ([f"-gencode=arch=compute_{portable},code=compute_{portable}"] if portable else [])


def compile_commands(build: Path, cxx: str, nvcc: str | None) -> dict[Path, list[str | Path]]:
    """The command that compiles each object file in ``build``, in the order of linking."""
    archs = cuda_archs(nvcc) if nvcc else []
    defines = ["-DVLMK_X86"] if X86 else []
    defines += [f'-DVLMK_CUDA_ARCHS="{";".join(archs)}"'] if nvcc else []
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    commands = {build / "bindings.o": [cxx, *CXX_FLAGS, *defines, *includes, "-c", CSRC / "bindings.cpp"]}
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        for isa, flags in ISAS.items():
            object_file = build / f"cpu_{source.stem}_{isa}.o"
            commands[object_file] = [cxx, *CXX_FLAGS, *flags, f"-DVLMK_ISA={isa}", "-c", source]
    if nvcc:
        flags = ["-std=c++17", "-O3", "-ccbin", cxx, "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0", *gencode(archs)]
        for source in sorted((CSRC / "cuda").glob("*.cu")):
            commands[build / f"cuda_{source.stem}.o"] = [nvcc, *flags, "-c", source]
    return commands


class BuildNative(build_ext):
    def build_extension(self, ext: Extension) -> None:
        cxx, nvcc = find_cxx(), find_nvcc()
        build = Path(self.build_temp).absolute()
        build.mkdir(parents=True, exist_ok=True)
        commands = compile_commands(build, cxx, nvcc)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self._run, ([*command, "-o", target] for target, command in commands.items())))

        output = Path(self.get_ext_fullpath(ext.name)).absolute()
        output.parent.mkdir(parents=True, exist_ok=True)
        if nvcc:
            link = [nvcc, "-shared", "-cudart=static", "-ccbin", cxx, "-Xcompiler=-fopenmp", "-Xlinker=--exclude-libs,ALL"]
        else:
            link = [cxx, "-shared", "-fopenmp"]
        self._run([*link, *commands, "-o", output])

    def _run(self, command: list[str | Path]) -> None:
        command = [str(part) for part in command]
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True)


extensions = [Extension("vlmkernels._C", sources=[])]
if find_cxx() is None:
    if os.environ.get("VLMKERNELS_CUDA") == "1":
        raise SystemExit("VLMKERNELS_CUDA=1 needs a C++ compiler, and c++, g++ and clang++ are not on PATH")
    print("vlmkernels: no C++ compiler found; installing without the backends cpp and cuda")
    extensions = []

setup(ext_modules=extensions, cmdclass={"build_ext": BuildNative})
