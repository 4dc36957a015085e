"""Every CUDA kernel compiles for the supported GPUs: no stack memory, few registers, 16-byte loads and stores."""

import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
CACHE = ROOT / "build" / "cuda"
# The oldest supported architecture and that of the measured GPU. `make wheel` compiles sm_100a too.
ARCHS = ["80", "90a"]

# 65536 registers / (48 x 256 threads) = 5 blocks per multiprocessor, the launch bounds of the two large kernels.
MAX_REGISTERS = {"gather_logps_fwd_kernel": 48, "gather_logps_bwd_kernel": 48, "gather_logps_merge_kernel": 40}
# 65536 registers / (4 x 256, 2 x 512 or 1 x 1024 threads); of the last two, 3 x 256 and 2 x 256.
MAX_REGISTERS |= {
    "linear_kl_kernel": 64,
    "linear_logps_kernel": 64,
    "pack_patches_kernel": 64,
    "pack_patches_general_kernel": 64,
    "grpo_loss_kernel": 64,
    "grpo_loss_finish_kernel": 64,
    "group_advantages_kernel": 64,
    "rotary_kernel": 64,
    "decode_merge_kernel": 64,
    "sample_sums_kernel": 80,
    "sample_draw_kernel": 128,
}
# 65536 registers / (2 x 128 threads): the sums of a tile of 64 rows are in registers.
MAX_REGISTERS |= {"decode_parts_kernel": 255}

NVCC = shutil.which("nvcc", path=f"{os.environ['CUDA_HOME']}/bin" if "CUDA_HOME" in os.environ else None)
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is neither on PATH nor in CUDA_HOME/bin")

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'(.*?)(?=Compiling entry function|\Z)", re.DOTALL)


def compile_object(source: Path) -> tuple[Path, str]:
    """The object file of ``source`` and the output of ptxas, from an earlier run if the text is the same."""
    command = [NVCC, "-std=c++17", "-O3", "-c", "-Xcompiler=-fPIC", "-Xptxas", "-v"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    digest = hashlib.sha256(repr(command).encode())
    for path in [source, *sorted((ROOT / "csrc").rglob("*.*h"))]:
        digest.update(path.read_bytes())
    target = CACHE / f"{source.stem}-{digest.hexdigest()[:16]}.o"
    log = target.with_suffix(".log")
    if not log.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        for old in CACHE.glob(f"{source.stem}-*"):
            old.unlink(missing_ok=True)
        done = subprocess.run([*command, source, "-o", target], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        log.write_text(done.stderr)
    return target, log.read_text()


@pytest.fixture(scope="module")
def compiled() -> dict[str, tuple[Path, str]]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(compile_object, SOURCES)
        return {source.stem: result for source, result in zip(SOURCES, results, strict=True)}


@pytest.fixture(scope="module")
def entries(compiled) -> list[dict]:
    """One row per compiled kernel: its name, its architecture and the counts of ptxas."""
    rows = []
    for _, log in compiled.values():
        for symbol, target, text in ENTRY.findall(log):
            kernel = re.search(r"\d([a-z_]+_kernel)", symbol)[1]
            counts = {name: re.search(rf"(\d+) bytes {name}", text) for name in ("stack frame", "spill stores", "spill loads")}
            counts["registers"] = re.search(r"Used (\d+) registers", text)
            rows.append(
                {"kernel": kernel, "symbol": symbol, "arch": target.removeprefix("sm_")}
                | {k: int(m[1]) for k, m in counts.items()}
            )
    return rows


def test_every_kernel_is_compiled_for_every_architecture(entries):
    headers = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cuh"))
    kernels = set(re.findall(r"__global__[^;{]*?(\w+_kernel)\(", headers))
    assert kernels == set(MAX_REGISTERS)
    assert {(row["kernel"], row["arch"]) for row in entries} == {(name, arch) for name in kernels for arch in ARCHS}


def test_the_sanitizer_program_compiles(tmp_path):
    command = [NVCC, "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-c", ROOT / "tests" / "sanitizer" / "kernels.cu"]
    done = subprocess.run([*command, "-o", tmp_path / "kernels.o"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_is_on_the_stack(entries):
    assert not [row for row in entries if row["stack frame"] or row["spill stores"] or row["spill loads"]]


def test_registers(entries):
    assert not [row for row in entries if row["registers"] > MAX_REGISTERS[row["kernel"]]]


def instructions(target: Path, arch: str) -> dict[str, list[str]]:
    """The instructions of each function of an object file for an architecture."""
    triton = pytest.importorskip("triton")
    tool = shutil.which("cuobjdump") or triton.knobs.nvidia.cuobjdump.path
    command = [tool, "-sass", "-arch", f"sm_{arch}", target]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        text.partition("\n")[0].strip(): re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text)
        for text in re.split(r"Function : ", sass)[1:]
    }


@pytest.mark.parametrize("arch", ARCHS)
def test_decode_attention_uses_tensor_cores(compiled, arch):
    """16-bit products are HMMA, and keys and values are copied to shared memory and read from it by vectors of 16 bytes."""
    found = 0
    for name, names in instructions(compiled["decode_attention"][0], arch).items():
        if "decode_parts" not in name or not re.search(r"\db?f16", name):
            continue
        found += 1
        assert [i for i in names if i.startswith("HMMA.16816.F32")], name
        assert [i for i in names if i.startswith("LDGSTS") and i.endswith(".128")], name
        assert [i for i in names if i == "LDS.128"], name
        assert not [i for i in names if i.startswith(("LDL", "STL"))], name
    assert found == 4  # two formats, two widths


@pytest.mark.parametrize("arch", ARCHS)
def test_gather_logps_has_four_vectors_in_flight(compiled, arch):
    """The loop over a row issues four 16-byte loads, with only address arithmetic between them."""
    functions = instructions(compiled["gather_logps"][0], arch).items()
    large = {name: found for name, found in functions if re.match(r"\w*(fwd|bwd)_kernel", name)}
    assert len(large) == 12  # three dtypes, with and without entropy
    for name, found in large.items():
        memory = [i for i in found if i.startswith(("LDG", "STG", "MUFU.EX2", "BAR", "BRA", "LDL", "STL"))]
        assert not [i for i in memory if i.startswith(("LDL", "STL"))]
        batches = re.findall(r"(?:LDG\S*\.128 ?){4}", " ".join(memory))
        assert batches, name
        if "bwd_kernel" in name:
            assert any(i.startswith("STG") and i.endswith(".128") for i in memory)
