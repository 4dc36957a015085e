"""How often the doctor finds a problem in simulated runs without a fault, and in runs that learn nothing.

python bench/doctor_simulated.py                 # 60 runs of each scenario
python bench/doctor_simulated.py --seed 1 --only slow "slow, longer"

The scenarios, their parameters and the seeds are others than those of tests/doctor/test_simulated_runs.py, with which
thresholds may be chosen. A run counts if any of six checks, after a sixth of its logs and so on, finds a problem.
"""

import argparse
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
from harness import ROOT

sys.path.insert(0, str(ROOT / "tests"))

from support.simulated_runs import simulate

from vlmkernels.doctor import PROBLEM, Run, diagnose

CHECKS = 6
LARGE_BATCH = {"prompts": 128, "group_size": 8, "logging_steps": 1}
SCENARIOS = {
    "fast": {},
    "very fast": {"gain": 3.0},
    "slow": {"gain": 0.3},
    "slower": {"gain": 0.2},
    "slow, steady": {"gain": 0.4, "pace": 0.6},
    "learned in the first steps": {"gain": 2.5, "pace": 0.02},
    "slow, drifting difficulty": {"gain": 0.3, "drift": 0.3, "memory": 8},
    "fast, drifting difficulty": {"drift": 0.4, "memory": 40},
    "slow, longer": {"gain": 0.3, "length": 3.5},
    "slow, shorter": {"gain": 0.3, "length": 0.3},
    "slow, entropy falls": {"gain": 0.3, "entropy": 0.25},
    "slow, entropy rises": {"gain": 0.3, "entropy": 1.9},
    "slow, resumed": {"gain": 0.3, "resumed": 0.7},
    "learned, resumed": {"gain": 2.5, "pace": 0.1, "resumed": 0.4},
    "slow, image use falls": {"gain": 0.3, "image_use": 0.05},
    "slow, large batch": {"gain": 0.3, **LARGE_BATCH},
    "slow, pairs": {"gain": 0.3, "group_size": 2},
    "nothing": {"gain": 0.0},
    "nothing, large batch": {"gain": 0.0, **LARGE_BATCH},
}


def draw_setting(draw: np.random.Generator) -> dict:
    """Return what the scenarios leave open. In groups of 3 with extreme rates, most groups lack spread, which is a fault."""
    size = int(draw.choice([3, 6, 12, 32]))
    return {
        "group_size": size,
        "prompts": int(draw.choice([3, 6, 16, 48])),
        "rate": float(draw.uniform(0.2, 0.8) if size < 6 else draw.uniform(0.08, 0.92)),
        "reward": str(draw.choice(["binary", "graded", "several", "scaled", "sparse"])),
        "logging_steps": int(draw.choice([1, 2, 4, 20])),
        "logs": int(draw.integers(40, 200)),
        "is_trl": bool(draw.random() < 0.5),
    }


def until(run: Run, logs: int) -> Run:
    """The run as it is after this many logs."""
    steps = run.steps[:logs]
    completions = {step: groups for step, groups in run.completions.items() if step <= steps[-1]["step"]}
    return replace(run, steps=steps, completions=completions)


def problems(run: Run) -> set[str]:
    """The rules that find a problem at any of the checks."""
    ends = [max(len(run.steps) * check // CHECKS, 5) for check in range(1, CHECKS + 1)]
    return {finding.rule for end in ends for finding in diagnose(until(run, end)) if finding.severity == PROBLEM}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=7_000_000)
    parser.add_argument("--runs", type=int, default=60, help="number of runs of each scenario [60]")
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), metavar="SCENARIO")
    args = parser.parse_args()
    for name in args.only:
        draw, rules, count = np.random.default_rng([args.seed, *name.encode()]), Counter(), 0
        for number in range(args.runs):
            found = problems(simulate(args.seed + 1000 + number, **{**draw_setting(draw), **SCENARIOS[name]}))
            rules.update(found)
            count += bool(found)
        print(f"{name:28} {count:3} of {args.runs}", *(f"{rule} {times}" for rule, times in rules.most_common()), flush=True)


if __name__ == "__main__":
    main()
