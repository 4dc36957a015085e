"""Run the demo with seeds 0, 1 and 2 and write metrics and curves to bench/results/demo.json.

python bench/demo_seeds.py
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import RESULTS, commit, device_name

SEEDS = (0, 1, 2)


def main() -> int:
    RESULTS.mkdir(exist_ok=True)
    runs = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "vlmkernels.cli", "demo", "--seed", str(seed), "--output", folder]
            code = subprocess.run(command, check=False).returncode
            runs.append({"exit_code": code, **json.loads((Path(folder) / "metrics.json").read_text())})
        content = {"device": device_name(), "commit": commit(), "runs": runs}
        (RESULTS / "demo.json").write_text(json.dumps(content, indent=1) + "\n")
    for run in runs:
        print(f"seed {run['seed']}: {run['accuracy_before']:.1%} -> {run['accuracy_after']:.1%}, exit code {run['exit_code']}")
    return max(run["exit_code"] for run in runs)


if __name__ == "__main__":
    sys.exit(main())
