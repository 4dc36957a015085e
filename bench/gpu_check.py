"""A run of tests and benchmarks on a machine with one GPU that is available for a short time and has no network.

    python3 bench/gpu_check.py STAGE [STAGE ...] [--only WORD ...]      (or: make gpu-check STAGE="correct fast" ONLY="rotary")

Stages: `correct` (environment, ceilings, tests of every kernel), `fast` (benchmarks of kernels), `why` (ncu and
compute-sanitizer), `system` (attention, decoding, training step), or `all`. With --only, a stage runs only what has one of the
words in its name: test files, rows of BENCHES, cases of kernel_cases.py. Environment variables:

    GPU_BUDGET_S        seconds for all stages together, instead of the sum of BUDGETS. Only the last stage may take more than
                        its own
    GPU_OUT             folder of the results, by default bench/results
    VLMKERNELS_COMMIT   the commit that results are labeled with; by default that of the checkout
    GPU_WORKERS         pytest-xdist workers, by default 12 or one per core

Each stage writes <stage>.log as it goes; `correct` also appends every test's outcome to outcomes.jsonl. A stage that runs out
of time is cut, and what it has written stays. The last lines are a table of what ran, how long it took and what was cut.
Without a GPU, or with --dry-run, each stage runs a small part on the CPU, which shows that the script works.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = {"correct": 300, "fast": 550, "why": 120, "system": 700}  # 28 minutes

# Test files of tests/ in the order in which they start; "*" stands for all others.
TESTS = (
    *(f"ops/test_{name}" for name in ("decode_attention", "sample_logps", "linear_sample_logps", "linear_kl", "fixed_matmul")),
    *(f"ops/test_{name}" for name in ("gather_logps", "gather_logps_cuda", "linear_logps", "linear_grpo_loss", "grpo_loss")),
    *(f"ops/test_{name}" for name in ("on_device", "gated_delta_rule", "causal_conv1d", "linear_logps_fused")),
    *(f"ops/test_{name}" for name in ("group_advantages", "rotary", "pack_patches")),
    "*",
    "ops/test_tree_attention",  # it compiles FlexAttention
)
MAX_RERUNS = 5
OUTCOMES = ("passed", "failed", "skipped", "not run")


class Bench(NamedTuple):
    """A process that runs benchmarks, and its limits in seconds."""

    file: str
    select: str = ""  # a -k expression
    limit: float = 60  # of the process
    rounds: float = 2  # of the timed rounds of a case
    case: float = 40  # of a whole case; a case that takes longer hangs, and its process ends with a traceback

    @property
    def name(self) -> str:
        return f"{self.file} {self.select}".strip()


# In the order in which they run: first what no device has results of.
BENCHES = {
    "fast": [
        Bench("bench_decode_attention.py", limit=75),
        Bench("bench_sample.py", "bfloat16", limit=75, rounds=1),
        Bench("bench_linear_kl.py", limit=60),
        Bench("bench_vision.py", "rotary or varlen", limit=45),
        Bench("bench_gather_logps.py", "8192", limit=40),
        Bench("bench_linear.py", "test_linear and 8b", limit=75),
        Bench("bench_grpo_loss.py", "64x512 or advantages"),
        Bench("bench_vision.py", "pack_patches_on_device or mrope or merge"),
        Bench("bench_linear.py", "test_forward and 8b and 8192", limit=30),
        Bench("bench_linear.py", "test_linear and not 8b", limit=90),
        Bench("bench_linear.py", "stream", limit=30),
    ],
    "system": [
        Bench("bench_decode.py", limit=150, rounds=5, case=140),
        Bench("bench_linear_attention.py"),
        Bench("bench_tree.py", limit=90),
        Bench("bench_step.py", "test_training and 3b and checkpointing", limit=220, rounds=5, case=215),
        Bench("bench_tree_attention.py", limit=90),
        Bench("bench_step.py", "test_training and 0.5b", limit=60, rounds=5, case=55),
        Bench("bench_step.py", "test_training and 3b and kept", limit=100, rounds=5, case=95),
    ],
}

# ncu: case of kernel_cases.py, backend, kernel.
PROFILES = [
    ("gather", "cuda", "gather_logps_fwd_kernel"),
    ("gather", "cuda", "gather_logps_bwd_kernel"),
    ("linear_rows", "cuda", "linear_logps_kernel"),
    ("gather", "triton", "gather_logps_bwd_kernel"),
    ("decode_attention", "cuda", "decode_parts_kernel"),
    ("sample", "cuda", "sample_draw_kernel"),
    ("linear_kl", "cuda", "linear_kl_kernel"),
]
# compute-sanitizer: its tools for the CUDA kernels (tests/sanitizer), and the cases of kernel_cases.py whose Triton kernels run
# under memcheck.
TOOLS = ("memcheck", "racecheck", "initcheck")
SANITIZED = ("decode_attention", "sample", "linear_kl", "tiles", "tree_attention", "misaligned_rows", "linear_rows")
SANITIZED += ("linear_grpo", "grpo_loss", "group_advantages", "rotary", "pack_patches")


class Stage:
    """A stage's log, its time budget, its subprocesses, and what of its rows to run."""

    def __init__(self, name: str, out: Path, budget: float, dry: bool, only: tuple[str, ...] = ()) -> None:
        self.name, self.out, self.dry, self.only = name, out, dry, only
        self.ran: list[tuple[str, float, str]] = []  # what, seconds, how it ended
        self.log = (out / f"{name}.log").open("a")
        self.end = time.monotonic() + budget
        self.environment = {**environment(), "GPU_OUT": str(out)}
        self.say(f"==== {name}: {budget:.0f} s, {time.strftime('%H:%M:%S')}")

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def selects(self, name: str) -> bool:
        return not self.only or any(word in name for word in self.only)

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.log.write(text + "\n")
        self.log.flush()

    def run(self, name: str, command: list, limit: float, quiet: bool = False, **environment: str) -> int | None:
        """Run and return the exit status, None if cut off. Output goes to the log, and to the screen unless ``quiet``."""
        limit = min(limit, self.left)
        command = [str(part) for part in command]
        shown = shlex.join("CODE" if "\n" in part else part for part in command)
        if limit < 2:
            self.say(f"---- no time left for: {shown}")
            self.ran.append((name, 0.0, "no time left"))
            return None
        self.say(f"---- {shown}    (at most {limit:.0f} s)")
        start = time.monotonic()
        process = subprocess.Popen(
            command, cwd=ROOT, env={**self.environment, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        reader = threading.Thread(target=self._copy, args=(process.stdout, quiet), daemon=True)
        reader.start()
        result = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            result = process.wait(limit)
        if result is None:  # an interrupt first, so that pytest writes its summary
            for number, grace in ((signal.SIGINT, 5), (signal.SIGKILL, 10)):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(grace)
        with contextlib.suppress(ProcessLookupError):  # its own subprocesses, which would use the GPU
            os.killpg(process.pid, signal.SIGKILL)
        reader.join(5)
        self.ran.append((name, time.monotonic() - start, "cut off" if result is None else f"exit status {result}"))
        self.say(f"---- {self.ran[-1][2]} after {self.ran[-1][1]:.1f} s")
        return result

    def _copy(self, stream, quiet: bool) -> None:
        for line in stream:
            self.log.write(line)
            self.log.flush()
            if not quiet:
                print(line, end="", flush=True)


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def python(*arguments) -> list:
    return [sys.executable, *arguments]


# ---- correct ----


def show_environment(stage: Stage) -> None:
    if shutil.which("nvidia-smi") and not stage.dry:
        fields = "name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit,ecc.mode.current"
        stage.run("nvidia-smi", ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"], 20)
    stage.run("vlmkernels env", python("-m", "vlmkernels.cli", "env"), 60)
    code = """
import importlib.metadata, sys
print("python", sys.version.split()[0])
for name in ("numpy", "accelerate", "peft", "trl", "liger_kernel", "hypothesis", "pytest", "pytest-xdist", "pytest-timeout"):
    try: print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError: print(name, "is missing")
"""
    stage.run("versions", python("-c", code), 30)


def need_extension(stage: Stage) -> None:
    """Check that vlmkernels._C has CUDA code and works; otherwise build it for this GPU."""
    code = "import vlmkernels._C as c; print('_C', c.__file__, c.cuda_architectures); assert c.cuda_architectures"
    check = "extension", python("-c", code), 30
    if stage.dry:
        stage.run(*check)
        return
    # A module that was built from other sources may load, but then it fails on the CPU too.
    calls = "extension on the CPU", python("bench/kernel_cases.py", "all", "--backend", "cpp"), 30
    if stage.run(*check) == 0 and stage.run(*calls) == 0:
        return
    query = "import torch; major, minor = torch.cuda.get_device_capability(); print(f'{major}{minor}' + 'a' * (major >= 9))"
    done = subprocess.run(python("-c", query), capture_output=True, text=True, env=stage.environment)
    build = python("setup.py", "--quiet", "build_ext", "--inplace", "--build-temp", "build/gpu-check")
    stage.run("build", build, 150, quiet=True, VLMKERNELS_CUDA="1", VLMKERNELS_CUDA_ARCHS=done.stdout.strip())
    if stage.run(*check) == 0:
        stage.run(*calls)


def measure_ceilings(stage: Stage) -> None:
    """The limits of every kernel: bytes per second of a copy, operations per second of a matrix product."""
    code = "import harness; print(harness.device_name(), harness.ceilings() if harness.GPU else 'has no GPU')"
    stage.run(
        "ceilings", python("-c", code), 60, PYTHONPATH=os.pathsep.join([str(ROOT / "bench"), stage.environment["PYTHONPATH"]])
    )


def test_files() -> list[str]:
    """The test files with tests for a GPU, relative to tests/ and without suffix."""
    marked, tests = re.compile(r"pytest\.mark\.(device|gpu)\b"), ROOT / "tests"
    files = [path for path in sorted(tests.rglob("test_*.py")) if marked.search(path.read_text())]
    return [path.relative_to(tests).with_suffix("").as_posix() for path in files]


def ordered_test_files() -> list[str]:
    others = sorted(set(test_files()).difference(TESTS))
    return [file for name in TESTS for file in (others if name == "*" else [name])]


def pytest_command(stage: Stage, tests: list[str], outcomes: Path, workers: int | None = None) -> list:
    command = python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "support.gpu_session", "--outcomes", outcomes, "--tb=short"
    )
    if installed("pytest_timeout"):
        command += ["--timeout", 120, "--timeout-method", "thread"]
    if installed("xdist"):
        workers = workers or (1 if stage.dry else int(os.environ.get("GPU_WORKERS") or min(12, os.cpu_count() or 1)))
        # Small chunks keep the order of the files.
        command += ["-n", workers, "--dist", "load", "--maxschedchunk", 4]
    return [*command, *tests]


def read_outcomes(path: Path) -> list[dict]:
    """The last outcome of each test, failures before all others. The outcome of a test that was not reached is "not run"."""
    rows: dict[str, dict] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # an incomplete last line
            row = json.loads(line)
            if rows.get(row["test"], {}).get("outcome") != "failed":
                rows[row["test"]] = row
    return list(rows.values())


def rerun_failures(stage: Stage, failed: list[dict]) -> None:
    """Rerun some failures of different test functions with synchronous launches, each in its own process if possible.

    A test that passes now points to a race condition, or to a test that ran before it.
    """
    functions: dict[str, str] = {}
    for row in failed:
        if "::" in row["test"]:
            functions.setdefault(row["test"].partition("[")[0], row["test"])
    tests = list(functions.values())[:MAX_RERUNS]
    if tests:
        command = pytest_command(stage, tests, stage.out / "reruns.jsonl", workers=len(tests))
        stage.run("failures again", [*command, "-rfEsp"], 90, CUDA_LAUNCH_BLOCKING="1")


def report(stage: Stage, rows: list[dict]) -> dict[str, dict[str, int]]:
    """Print a table of the test files, which is also returned, and the failures."""
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        counts.setdefault(row["test"].partition("::")[0], dict.fromkeys(OUTCOMES, 0))[row["outcome"]] += 1
    stage.say("".join([f"\n{'file':44}", *(f"{outcome:>8}" for outcome in OUTCOMES)]))
    for file, count in sorted(counts.items()):
        stage.say("".join([f"{file:44}", *(f"{number:8}" for number in count.values())]))
    failed = [row for row in rows if row["outcome"] == "failed"]
    for row in failed[:60]:
        first = next((line for line in row.get("message", "").splitlines() if line.strip()), "")
        stage.say(f"FAILED {row['test']}: {first[:200]}")
    if len(failed) > 60:
        stage.say(f"and {len(failed) - 60} more in outcomes.jsonl")
    return counts


def keep_counts(stage: Stage, counts: dict) -> None:
    """Write the counts to the results file of this device."""
    sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
    os.environ["GPU_OUT"] = str(stage.out)
    import harness

    harness.write_tests(counts)


def correct(stage: Stage) -> None:
    show_environment(stage)
    need_extension(stage)
    measure_ceilings(stage)
    outcomes = stage.out / "outcomes.jsonl"
    outcomes.unlink(missing_ok=True)
    if stage.dry:
        command = pytest_command(stage, ["tests/ops/test_merge_image_features.py"], outcomes)
        stage.run("tests", [*command, "-k", "scatter or named"], 120)
    else:
        files = [f"tests/{file}.py" for file in ordered_test_files() if stage.selects(file)]
        # Failures are listed at the end; tracebacks are only in the log.
        command = [*pytest_command(stage, files, outcomes), "-m", "device or gpu"]
        stage.run("tests", command, stage.left - 45, quiet=True, OMP_NUM_THREADS="2", TORCHINDUCTOR_COMPILE_THREADS="1")
    rows = read_outcomes(outcomes)
    rerun_failures(stage, [row for row in rows if row["outcome"] == "failed"])
    counts = report(stage, rows)
    if not stage.dry:
        keep_counts(stage, counts)


# ---- fast, system ----


def benchmarks(stage: Stage) -> None:
    for bench in BENCHES[stage.name]:
        if not stage.selects(bench.name):
            continue
        command = python("-m", "pytest", "-q", "-p", "no:cacheprovider", f"bench/{bench.file}")
        command += ["-k", bench.select] if bench.select and not stage.dry else []  # cases on a CPU have other names
        if installed("pytest_timeout"):
            command += ["--timeout", bench.case, "--timeout-method", "thread"]
        command += ["--collect-only"] if stage.dry else []
        stage.run(bench.name, command, bench.limit, BENCH_LIMIT_S=str(bench.rounds))


# ---- why ----


def sanitizer_program(stage: Stage) -> Path:
    """Compile tests/sanitizer/kernels.cu for this GPU, once."""
    program = ROOT / "build" / "sanitizer" / "kernels"
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        sources = [ROOT / "tests" / "sanitizer" / "kernels.cu", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
        command = ["nvcc", "-std=c++17", "-O3", "-lineinfo", "-arch=native", "--threads=0", "-o", program, *sources]
        stage.run("build for compute-sanitizer", command, 90)
    return program


def why(stage: Stage) -> None:
    cases = ROOT / "bench" / "kernel_cases.py"
    if stage.dry:
        stage.run("Triton", python(cases, "rotary", "grpo_loss", "--backend", "triton"), 60, TRITON_INTERPRET="1")
        return
    sanitize = ["compute-sanitizer", "--error-exitcode", 9, "--print-limit", 20, "--tool"]
    program = sanitizer_program(stage)
    for tool in TOOLS:
        stage.run(tool, [*sanitize, tool, program], 30)
    for case, backend, kernel in PROFILES:
        if stage.selects(case):
            options = ["--clock-control", "none", "--set", "basic", "--launch-count", 1, "--kernel-name", f"regex:{kernel}"]
            stage.run(f"ncu {kernel}", ["ncu", *options, *python(cases, case, "--backend", backend, "--large")], 45)
    # Without the caching allocator each tensor is a separate allocation, whose bounds memcheck knows.
    if chosen := [case for case in SANITIZED if stage.selects(case)]:
        command = [*sanitize, "memcheck", *python(cases, *chosen, "--backend", "triton")]
        stage.run("memcheck of Triton kernels", command, 60, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


STAGES = {"correct": correct, "fast": benchmarks, "why": why, "system": benchmarks}


def names_of(stage: str) -> list[str]:
    """What --only selects from."""
    if stage == "correct":
        return ordered_test_files()
    return [bench.name for bench in BENCHES[stage]] if stage in BENCHES else [*SANITIZED, *(case for case, _, _ in PROFILES)]


def summary(stages: list[Stage]) -> str:
    lines = [f"\n{'stage':10}{'seconds':>8}  {'result':16}what"]
    for stage in stages:
        lines += [f"{stage.name:10}{seconds:8.1f}  {result:16}{what}" for what, seconds, result in stage.ran]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", default=["all"], choices=[*STAGES, "all"])
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="run only what has one of the words in its name")
    parser.add_argument("--dry-run", action="store_true", help="a small part of each stage, on the CPU")
    options = parser.parse_args()
    if not installed("torch"):
        parser.error(f"torch is not installed in {sys.executable}; with make, PYTHON=... names another Python")
    names = [*STAGES] if "all" in options.stages else options.stages
    for word in options.only:
        if not any(word in name for stage in names for name in names_of(stage)):
            parser.error(f"--only must be part of a name in the stages {', '.join(names)}, got {word!r}")
    out = Path(os.environ.get("GPU_OUT") or ROOT / "bench" / "results").absolute()
    out.mkdir(parents=True, exist_ok=True)
    dry = options.dry_run or not shutil.which("nvidia-smi")
    end = time.monotonic() + float(os.environ.get("GPU_BUDGET_S") or sum(BUDGETS[name] for name in names))
    stages: list[Stage] = []
    for name in names:
        left = end - time.monotonic()
        stages.append(Stage(name, out, left if name == names[-1] else min(left, BUDGETS[name]), dry, tuple(options.only)))
        STAGES[name](stages[-1])
        stages[-1].say(f"==== {name}: {stages[-1].left:.0f} s left")
    stages[-1].say(summary(stages))
    for stage in stages:
        stage.log.close()


if __name__ == "__main__":
    main()
