"""A step of TRL's GRPOTrainer with and without ``patch_trl()``, in the setting of bench_step.py, each run in its own process.

python bench/bench_trl.py        # the providers take turns; prints what pytest records
"""

import math
import statistics

import harness
import pytest
from bench_step import SETTING, in_process, parts_of

TURNS = 3
PROVIDERS = {"TRL, patch_trl()": "trl patched", "TRL": "trl"}


def measure(turns: int) -> list[dict]:
    """A row per provider, ours first: medians over the turns. Both run once in each turn."""
    runs = {name: [] for name in PROVIDERS}
    for _ in range(turns):
        for name, provider in PROVIDERS.items():
            runs[name].append(in_process(provider, steps=1))
        norms = {name: of[-1]["grad_norm"] for name, of in runs.items()}
        same = all(math.isclose(norm, norms["TRL"], rel_tol=1e-3) for norm in norms.values())
        assert same, norms  # both take the same step on the same samples
    median = {name: {part: statistics.median(run[part] for run in of) for part in of[0]} for name, of in runs.items()}
    ours, rows = median["TRL, patch_trl()"], []
    for name, parts in median.items():
        training = parts["step"] - parts["rollout"]
        share = f"without the rollout {training:.2f} s, {training / (ours['step'] - ours['rollout']):.2f} times ours"
        rows.append({
            "provider": name, "ms": 1e3 * parts["step"], "rounds": turns,
            "ratio_to_ours": round(parts["step"] / ours["step"], 2), "peak_mib": parts["peak_mib"],
            "parts": f"{parts_of(parts)}; {share}",
        })  # fmt: skip
    return rows


def test_step_of_trl(benchmark):
    pytest.importorskip("trl")
    title = ", ".join(f"{name} {value}" for name, value in SETTING.items())
    harness.record(f"TRL step, {title}", measure(TURNS))
    benchmark.pedantic(lambda: None)  # measured above, in other processes


if __name__ == "__main__":
    print("\n".join(harness.table(measure(TURNS))))
