"""Measure providers of one computation side by side: correctness, time, memory, and useful GB/s and TFLOP/s.

A bench module defines cases, and `compare` measures one:

    rows = compare(benchmark, Case("name", {"vlmkernels": f, "peer": g}, check, {"floor": h}, bytes=..., flops=...))

Providers take turns in rounds, so that other load on the machine affects all of them; the result is the median. On a GPU, CUDA
events time several short calls together. Every call has the same inputs: if they fit in the L2 cache of the GPU ("fits_l2" in
the results), the time is that of a warm cache.

Results are written to <GPU_OUT or bench/results>/<device>.json after every case, and a table ends the run (conftest.py).
Environment variables:

    BENCH_LIMIT_S       time limit of the timed rounds of a case, in seconds, instead of the limit of the case
    BENCH_COMPILE       0 or 1: measure also providers that take long to compile ("torch.compile ...", and ``late`` ones);
                        by default 0 on a GPU, where time may be short, and 1 on the CPU
    GPU_OUT             folder of the results
    VLMKERNELS_COMMIT   the measured commit, where there is no git checkout
"""

import contextlib
import functools
import gc
import importlib.metadata
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vlmkernels import backend

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))  # benchmarks use tests/support, also when they run as scripts
RESULTS = Path(os.environ.get("GPU_OUT") or ROOT / "bench" / "results")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
MIN_ROUNDS, MAX_ROUNDS = 5, 40
COMPILE = os.environ.get("BENCH_COMPILE", "0" if GPU else "1") == "1"
TIMED_S = 5e-3 if GPU else 0.0  # calls are timed together until they take this long
MAX_CALLS = 100
LAUNCH_BOUND_S = 2e-3  # the profiler also measures the kernel time of calls shorter than this


def device_name() -> str:
    if GPU:
        return torch.cuda.get_device_name()
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    return f"{model.group(1).strip() if model else platform.processor()}, {os.cpu_count()} cores"


def backends(op: str, *tensors: torch.Tensor, first: str | None = None) -> list[str]:
    """The backends of ``op`` that support the tensors, without the reference; first ``first``, or what "auto" selects."""
    first = first or backend.choose(op, "auto", *tensors)
    names = (name for name in backend.backends_of(op).modules if name not in (first, "reference"))
    return [first, *(name for name in names if backend.why_not(op, name, *tensors) is None)]


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@functools.cache
def commit() -> str:
    """VLMKERNELS_COMMIT, or the commit of the checkout with "+changes" if files differ from it."""
    if given := os.environ.get("VLMKERNELS_COMMIT"):
        return given

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    try:
        changed = [line for line in git("status", "--porcelain").splitlines() if "bench/results/" not in line]
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def versions() -> dict[str, str]:
    names = ("torch", "triton", "transformers", "trl", "liger-kernel")
    return {name: importlib.metadata.version(name) for name in names if _installed(name)}


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def time_calls(run: Callable[[], object], calls: int = 1) -> float:
    """Seconds per call: wall time on the CPU; on a GPU the time between CUDA events, after one call that is not timed."""
    if GPU:
        run()  # allocates its memory, which a training loop then reuses; ``release`` has freed it
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            result = run()
            del result
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    start = time.perf_counter()
    for _ in range(calls):
        result = run()
        elapsed = time.perf_counter() - start
        del result  # the last call is not timed with it
    return elapsed / calls


@functools.cache
def ceilings() -> dict[str, float]:
    """What this machine reaches: GB/s of a copy (read and written), TFLOP/s of a bf16 matrix product of random data."""
    size, width, turns = (2**30, 8192, 20) if GPU else (2**28, 2048, 5)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    a, b = (torch.randn(width, width, device=DEVICE).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    runs = {
        "copy_gb_s": functools.partial(target.copy_, source),
        "gemm_tflop_s": functools.partial(torch.mm, a, b, out=out),
    }
    work = {"copy_gb_s": 2 * size / 1e9, "gemm_tflop_s": 2 * width**3 / 1e12}
    found = {}
    for name, run in runs.items():
        time_calls(run, 5 if GPU else 1)
        rate = work[name] / statistics.median(time_calls(run, 4 if GPU else 1) for _ in range(turns))
        found[name] = float(f"{rate:.4g}")
    return found | {"copy_bytes": size, "gemm_width": width}


def release() -> None:
    """Free unused memory for the next provider."""
    gc.collect()
    if GPU:
        with contextlib.suppress(torch.AcceleratorError):  # the error of an earlier kernel, already recorded
            torch.cuda.empty_cache()


def reason(error: BaseException) -> str:
    """The error of a provider, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"


def profiled(run: Callable[[], object], calls: int = 10) -> dict[str, float]:
    """The total kernel time of a call in microseconds and the number of its kernels; {} if the profiler fails."""
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(calls):
                run()
            torch.cuda.synchronize()
        events = [event for event in profile.key_averages() if event.self_device_time_total]
        time_us, count = sum(event.self_device_time_total for event in events), sum(event.count for event in events)
    except Exception as error:
        print(f"profiler: {reason(error)}")
        return {}
    return {"gpu_us": round(time_us / calls, 1), "gpu_kernels": round(count / calls, 1)} if events else {}


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_memory(run: Callable[[], object]) -> int:
    """The peak of one call in bytes, above the memory before it: torch's allocations on a GPU, else resident memory."""
    gc.collect()
    if GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    before, peak, done = _resident(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = run()
    peak = max(peak, _resident())
    done.set()
    watcher.join()
    del result
    return max(0, peak - before)


def interleave(
    runs: dict[str, Callable[[], object]], limit_s: float, warm_ups: int = 1
) -> tuple[dict[str, list[float]], dict[str, int], dict[str, str]]:
    """Time the runs in turns, in a new order each round, after warm-up calls, for about ``limit_s`` seconds at most.

    Returns:
        The times of a call of each run, how many calls were timed together, and the errors of the runs that raised.
    """
    times: dict[str, list[float]] = {}
    calls, failed = {}, {}

    def timed(name: str, number: int) -> float | None:
        try:
            return time_calls(runs[name], number)
        except Exception as error:
            failed[name] = reason(error)
        release()
        return None

    for name in runs:
        for _ in range(warm_ups):
            if name not in failed:
                timed(name, 1)
        if name not in failed and (once := timed(name, 1)) is not None:
            calls[name] = max(1, min(MAX_CALLS, math.ceil(TIMED_S / max(once, 1e-9)))) if GPU else 1
            times[name] = []
            if calls[name] > 1:  # the first call after another provider is slower: count again when warm
                once = timed(name, calls[name])
                calls[name] = max(1, min(MAX_CALLS, math.ceil(TIMED_S / max(once or TIMED_S, 1e-9))))
    gc.collect()
    gc.disable()
    held = torch.cuda.memory_allocated() if GPU else 0
    rng, order = random.Random(0), list(calls)
    start = time.perf_counter()
    try:
        for turn in range(MAX_ROUNDS):
            spent = time.perf_counter() - start
            if spent > limit_s and (turn >= MIN_ROUNDS or (turn and spent > 3 * limit_s)):
                break
            rng.shuffle(order)  # what ran before affects clocks and caches
            for name in order:
                if name not in failed and (value := timed(name, calls[name])) is not None:
                    times[name].append(value)
            if not GPU or torch.cuda.memory_allocated() > held + 2**28:
                gc.collect()
    finally:
        gc.enable()
    return {name: of for name, of in times.items() if of and name not in failed}, calls, failed


Work = float | Mapping[str, float] | None  # of a call: one number for all providers and floors, or a number for each name


def rates(name: str, seconds: float, bytes: Work, flops: Work, gpu_us: float | None = None) -> dict[str, float]:
    """Useful GB/s and TFLOP/s and their percentage of the ceilings; with gpu_us, also the percentage based on kernel time."""
    row = {}
    for work, rate, percent, scale, ceiling in (
        (bytes, "gb_s", "percent_of_copy", 1e9, "copy_gb_s"),
        (flops, "tflop_s", "percent_of_gemm", 1e12, "gemm_tflop_s"),
    ):
        amount = work.get(name) if isinstance(work, Mapping) else work
        if amount:
            row[rate] = float(f"{amount / seconds / scale:.4g}")
            row[percent] = round(100 * amount / seconds / scale / ceilings()[ceiling], 1)
            if gpu_us:
                row[f"gpu_{percent}"] = round(100 * amount / (gpu_us / 1e6) / scale / ceilings()[ceiling], 1)
    return row


@dataclass
class Case:
    """A computation and what is measured for it.

    Args:
        name: the title of the table.
        providers: functions that compute the same result. The first is ours, and so is every other whose name begins with
            "vlmkernels".
        check: ``check(name, result)`` raises if the result of a provider is wrong, and otherwise describes its error.
        floors: lower bounds of the time, such as a copy of the inputs.
        limit_s: time limit of the timed rounds, in seconds.
        bytes: useful bytes of a call: each input read once, each output written once.
        flops: useful FLOPs of a call: those of the matrix products that every implementation needs, each counted once.
        late: providers that take long to compile. They are measured last, as are those whose name begins with
            "torch.compile", in rounds with ours; all other results have been written by then.
    """

    name: str
    providers: dict[str, Callable[[], object]]
    check: Callable[[str, object], str]
    floors: dict[str, Callable[[], object]] = field(default_factory=dict)
    limit_s: float = 20.0
    bytes: Work = None
    flops: Work = None
    late: Collection[str] = ()

    @property
    def ours(self) -> str:
        return next(iter(self.providers))

    def is_late(self, name: str) -> bool:
        return name in self.late or name.startswith("torch.compile")

    def details(self) -> dict:
        """What the results keep besides the rows: the ceilings of this machine, and whether the data fit in the L2 cache."""
        found = {"ceilings": ceilings()} if self.bytes or self.flops else {}
        amounts = [x for x in (self.bytes.values() if isinstance(self.bytes, Mapping) else [self.bytes]) if x]
        if GPU and amounts:
            found["fits_l2"] = max(amounts) < torch.cuda.get_device_properties(0).L2_cache_size
        return found


class Comparison:
    """Measures the providers of a case and records their rows."""

    def __init__(self, case: Case) -> None:
        self.case, self.details = case, case.details()
        self.rows: list[dict] = []
        self.limit_s = float(os.environ.get("BENCH_LIMIT_S") or case.limit_s)

    def record(self) -> None:
        record(self.case.name, self.rows, **self.details)

    def check(self, runs: dict) -> tuple[dict[str, str], dict[str, int], list[dict]]:
        """The error and the peak memory of each provider, and a row for each that raises or is wrong."""
        errors, memory, missing = {}, {}, []
        for name, run in runs.items():
            try:
                error = self.case.check(name, run())
                memory[name] = peak_memory(run)
                errors[name] = error
            except Exception as raised:
                verdict = "wrong" if isinstance(raised, AssertionError) else "not measured"
                missing.append({"provider": name, "error": f"{verdict}: {reason(raised)}"})
            release()
        return errors, memory, missing

    def measure(self, runs: dict, floors: dict, again: dict) -> None:
        """Measure ``runs`` and ``floors``, in turns with ``again``, which already has a row, and record them."""
        errors, memory, missing = self.check(runs)
        timed = {name: run for name, run in runs.items() if name in errors} | floors
        warm_ups = 10 if again else 1  # a provider that compiles may recompile in the first few calls
        times, calls, failed = interleave({**timed, **again}, self.limit_s, warm_ups)
        missing += [{"provider": name, "error": f"not measured: {why}"} for name, why in failed.items() if name not in again]
        median = {name: statistics.median(values) for name, values in times.items()}
        for name in times.keys() - again.keys():
            kernels = profiled(timed[name]) if GPU and median[name] < LAUNCH_BOUND_S else {}
            own = {"floor": True} if name in floors else {"peak_mib": round(memory[name] / 2**20, 1), "error": errors[name]}
            own = {**rates(name, median[name], self.case.bytes, self.case.flops, kernels.get("gpu_us")), **kernels, **own}
            self.rows.append(timing(name, times[name], calls[name], median.get(self.case.ours)) | own)
        self.rows.extend(missing)
        self.sort()
        if self.rows:
            self.record()
        release()

    def sort(self) -> None:
        """The order of the tables: early and late providers, floors, and what was not measured."""
        order = [*sorted(self.case.providers, key=self.case.is_late), *self.case.floors]
        self.rows.sort(key=lambda row: (2 if "ms" not in row else 1 if row.get("floor") else 0, order.index(row["provider"])))

    def run(self) -> None:
        case = self.case
        late = {name: run for name, run in case.providers.items() if case.is_late(name)}
        if GPU:
            release()
            torch.cuda.synchronize()  # raises if an earlier case left the device in an error state
        self.measure({name: run for name, run in case.providers.items() if name not in late}, case.floors, {})
        if late and not COMPILE:
            self.rows.extend({"provider": name, "error": "not measured: needs BENCH_COMPILE=1"} for name in late)
            self.record()
            return
        for name, run in late.items():
            self.measure({name: run}, {}, {case.ours: case.providers[case.ours]} if self.measured(case.ours) else {})

    def measured(self, name: str) -> bool:
        return any(row["provider"] == name and "ms" in row for row in self.rows)


def timing(name: str, times: list[float], calls: int, ours: float | None) -> dict:
    """The times of a row, in milliseconds; ``ours`` is the median of our provider in the same rounds, in seconds."""
    digits, median = 4 if GPU else 3, statistics.median(times)
    return {
        "provider": name,
        "ms": round(1e3 * median, digits),
        "ms_min": round(1e3 * min(times), digits),
        "rounds": len(times),
        **({"calls": calls} if calls > 1 else {}),
        "ratio_to_ours": None if ours is None else round(median / ours, 2),
    }


def compare(benchmark, case: Case) -> list[dict]:
    """Measure the providers and floors of a case and return a row for each; ours also goes to pytest-benchmark.

    A provider that raises or is wrong is not timed: its row has the reason. All others are measured and recorded; then, if it
    was one of ours, AssertionError ends the benchmark.
    """
    __tracebackhide__ = True
    comparison = Comparison(case)
    comparison.run()
    rows = comparison.rows
    benchmark.extra_info.update(case=case.name, rows=rows)
    shown = comparison.measured(case.ours) and not GPU
    benchmark.pedantic(case.providers[case.ours] if shown else lambda: None, rounds=5)
    wrong = [row for row in rows if "ms" not in row and row["provider"].startswith("vlmkernels")]
    wrong = [f"{row['provider']}: {row['error']}" for row in wrong if "needs BENCH_COMPILE" not in row["error"]]
    assert not wrong, "; ".join(wrong)
    return rows


_records: dict[str, dict] = {}


def record(case: str, rows: list[dict], **more) -> None:
    """Keep the rows of a case and write them at once: a run that is cut short leaves its results."""
    _records[case] = {**more, "rows": rows}
    write_results()


def table(rows: list[dict]) -> list[str]:
    """The rows as a Markdown table."""
    last = "parts" if "parts" in rows[0] else "error"
    columns = {"gb_s": "GB/s", "percent_of_copy": "% of copy", "tflop_s": "TFLOP/s", "percent_of_gemm": "% of GEMM",
               "gpu_us": "kernels, us", "gpu_kernels": "kernels"}  # fmt: skip
    columns = {key: title for key, title in columns.items() if any(key in row for row in rows)}
    titles = "".join(f" {title} |" for title in columns.values())
    lines = [f"| provider | ms | times ours |{titles} peak MiB | {last} |"]
    lines += ["| --- | ---: | ---: |" + " ---: |" * len(columns) + " ---: | --- |"]
    for row in rows:
        if "ms" not in row:
            lines.append(f"| {row['provider']} |  |  |{'  |' * len(columns)}  | {row['error']} |")
            continue
        name = f"*{row['provider']}*" if row.get("floor") else row["provider"]
        peak, rest = row.get("peak_mib", ""), row.get(last, "")
        ratio = "" if row["ratio_to_ours"] is None else f"{row['ratio_to_ours']:.2f}"
        values = "".join(f" {row.get(key, '')} |" for key in columns)
        digits = 2 if row["ms"] >= 1 or not GPU else 4
        lines.append(f"| {name} | {row['ms']:.{digits}f} | {ratio} |{values} {peak} | {rest} |")
    return lines


def _update(change: Callable[[dict], object]) -> Path:
    """Apply ``change`` to the content of <device>.json."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{slug(device_name())}.json"
    content = json.loads(path.read_text()) if path.exists() else {"device": device_name(), "cases": {}}
    change(content)
    written = path.with_suffix(".json.part")
    written.write_text(json.dumps(content, indent=1) + "\n")
    written.replace(path)
    return path


@functools.cache
def gpu() -> dict:
    """The GPU, its driver and its CUDA version."""
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.partition("\n")[0].strip()
    except (OSError, subprocess.TimeoutExpired):
        driver = ""
    return {
        "name": properties.name,
        "driver": driver,
        "cuda": torch.version.cuda,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
    }


def provenance() -> dict:
    found = {"commit": commit(), "date": time.strftime("%Y-%m-%d"), "versions": versions()}
    return {**found, "gpu": gpu()} if GPU else found


def write_results() -> tuple[Path, dict[str, list[dict]]] | None:
    """Merge the cases of this run into the results of the device; each case keeps the commit at which it was measured."""
    if not _records:
        return None
    cases = {case: {**provenance(), "threads": torch.get_num_threads(), **content} for case, content in _records.items()}
    return _update(lambda content: content["cases"].update(cases)), {case: of["rows"] for case, of in _records.items()}


def write_tests(counts: dict[str, dict[str, int]]) -> Path:
    """Merge the test counts of each file into the results of this device; each file keeps the commit at which it ran.

    Counts of files that have been renamed or removed since are dropped.
    """

    def merge(content: dict) -> None:
        earlier = content.get("tests", {"files": {}})
        present = {file: of for file, of in earlier["files"].items() if (ROOT / file).exists()}
        files = {file: {"commit": earlier.get("commit"), **of} for file, of in present.items()}
        files |= {file: {**of, "commit": commit()} for file, of in counts.items()}
        content["tests"] = {**provenance(), "files": files}

    return _update(merge)
