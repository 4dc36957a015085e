"""Measures providers of one computation side by side: first that each is right, then how long it takes and what memory.

A bench module defines cases; `compare` runs one:

    rows = compare(benchmark, "case", {"ours": f, "peer": g}, check, limit_s=..., floor={...})

Providers take turns, round after round, so that what else the machine does meets all of them; the figure is the median.
Results go to bench/results/<device>.json and a table ends the run (conftest.py).
"""

import gc
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
MIN_ROUNDS, MAX_ROUNDS = 5, 40


def device_name() -> str:
    if GPU:
        return torch.cuda.get_device_name()
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    return f"{model.group(1).strip() if model else platform.processor()}, {os.cpu_count()} cores"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """The commit that was measured, with "+changes" where the tree differs from it; "" outside a checkout."""
    here = Path(__file__).parent
    try:
        git = lambda *args: subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True).stdout  # noqa: E731
        changed = [line for line in git("status", "--porcelain").splitlines() if "bench/results/" not in line]
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("VLMKERNELS_COMMIT", "")


def versions() -> dict[str, str]:
    names = ("torch", "triton", "transformers", "trl", "liger-kernel")
    return {name: importlib.metadata.version(name) for name in names if _installed(name)}


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call; on a GPU the time between events around it."""
    gc.collect()
    if GPU:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        result = run()
        end.record()
        torch.cuda.synchronize()
        del result
        return start.elapsed_time(end) / 1e3
    start = time.perf_counter()
    result = run()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes that one call takes at its peak beyond what was there: on a GPU torch's allocations, else resident memory."""
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


def interleave(runs: dict[str, Callable[[], object]], limit_s: float) -> dict[str, list[float]]:
    """Times of each run, in turns, after one warm-up turn, for at most about ``limit_s`` seconds."""
    for run in runs.values():
        seconds(run)
    times: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for turn in range(MAX_ROUNDS):
        if turn >= MIN_ROUNDS and time.perf_counter() - start > limit_s:
            break
        for name, run in runs.items():
            times[name].append(seconds(run))
    return times


def compare(
    benchmark,
    case: str,
    providers: dict[str, Callable[[], object]],
    check: Callable[[str, object], str],
    floors: dict[str, Callable[[], object]],
    limit_s: float = 20.0,
) -> list[dict]:
    """Measure ``providers`` and ``floors`` (what bounds them, such as a copy); the first provider is ours.

    ``check(name, result)`` raises if a provider's result is wrong, and describes its error otherwise: no provider that is
    wrong is timed. What a peer raises instead of a result stands in its row; what ours raises ends the benchmark. Returns a
    row per provider, and gives ours to pytest-benchmark.
    """
    errors, missing = {}, []
    for name, run in providers.items():
        try:
            errors[name] = check(name, run())
        except Exception as error:
            if name.startswith("vlmkernels"):
                raise
            reason = str(error).strip().partition("\n")[0][:120]
            missing.append({"provider": name, "error": f"not measured: {type(error).__name__}: {reason}"})
        if GPU:
            torch.cuda.empty_cache()  # what one provider kept is not missing to the next
    providers = {name: run for name, run in providers.items() if name in errors}
    memory = {name: peak_memory(run) for name, run in providers.items()}
    times = interleave({**providers, **floors}, limit_s)
    median = {name: statistics.median(values) for name, values in times.items()}
    ours = next(iter(providers))
    rows = [
        {
            "provider": name,
            "ms": round(1e3 * median[name], 3),
            "ms_min": round(1e3 * min(times[name]), 3),
            "rounds": len(times[name]),
            "ratio_to_ours": round(median[name] / median[ours], 2),
            **({"peak_mib": round(memory[name] / 2**20, 1), "error": errors[name]} if name in providers else {"floor": True}),
        }
        for name in times
    ] + missing
    benchmark.extra_info.update(case=case, rows=rows)
    benchmark.pedantic(providers[ours], rounds=5)
    record(case, rows)
    return rows


_records: dict[str, list[dict]] = {}


def record(case: str, rows: list[dict]) -> None:
    """Kept at once: a run that is cut short leaves what it measured."""
    _records[case] = rows
    write_results()


def table(rows: list[dict]) -> list[str]:
    """Markdown."""
    last = "parts" if "parts" in rows[0] else "error"
    lines = [f"| provider | ms | times ours | peak MiB | {last} |", "| --- | ---: | ---: | ---: | --- |"]
    for row in rows:
        if "ms" not in row:
            lines.append(f"| {row['provider']} |  |  |  | {row['error']} |")
            continue
        name = f"*{row['provider']}*" if row.get("floor") else row["provider"]
        peak, rest = row.get("peak_mib", ""), row.get(last, "")
        lines.append(f"| {name} | {row['ms']:.2f} | {row['ratio_to_ours']:.2f} | {peak} | {rest} |")
    return lines


def _update(change: Callable[[dict], object]) -> Path:
    """Apply ``change`` to the content of bench/results/<device>.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{slug(device_name())}.json"
    content = json.loads(path.read_text()) if path.exists() else {"device": device_name(), "cases": {}}
    change(content)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def provenance() -> dict:
    return {"commit": commit(), "date": time.strftime("%Y-%m-%d"), "versions": versions()}


def write_results() -> tuple[Path, dict[str, list[dict]]] | None:
    """Merge this run's cases into the device's results; each case keeps the commit it was measured at."""
    if not _records:
        return None
    cases = {case: {**provenance(), "threads": torch.get_num_threads(), "rows": rows} for case, rows in _records.items()}
    return _update(lambda content: content["cases"].update(cases)), dict(_records)


def write_tests(counts: dict[str, dict[str, int]]) -> Path:
    """Keep the outcome of a run of the tests on this device, per file."""
    return _update(lambda content: content.update(tests={**provenance(), "files": counts}))
