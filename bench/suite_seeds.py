"""Run the demo of shapes-and-digits with two seeds and write its metrics to bench/results/suite.json.

python bench/suite_seeds.py
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import RESULTS, commit, device_name

SEEDS = (0, 1)


def main() -> int:
    RESULTS.mkdir(exist_ok=True)
    runs = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "vlmkernels.cli", "demo", "--suite", "--seed", str(seed), "--output", folder]
            code = subprocess.run(command, check=False).returncode
            runs.append({"exit_code": code, **json.loads((Path(folder) / "eval.json").read_text())})
        content = {"device": device_name(), "commit": commit(), "runs": runs}
        (RESULTS / "suite.json").write_text(json.dumps(content, indent=1) + "\n")
    return max(run["exit_code"] for run in runs)


if __name__ == "__main__":
    sys.exit(main())
