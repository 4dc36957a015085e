"""Run the demo with several seeds and write its metrics to bench/results/demo.json, or with --suite to suite.json.

python bench/demo_seeds.py              # seeds 0, 1 and 2
python bench/demo_seeds.py --suite      # the demo of shapes-and-digits, seeds 0 and 1
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import RESULTS, commit, device_name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", action="store_true")
    suite = parser.parse_args().suite
    name, metrics, options, seeds = ("suite", "eval", ["--suite"], (0, 1)) if suite else ("demo", "metrics", [], (0, 1, 2))
    RESULTS.mkdir(exist_ok=True)
    runs = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "vlmkernels.cli", "demo", *options, "--seed", str(seed), "--output", folder]
            code = subprocess.run(command, check=False).returncode
            runs.append({"exit_code": code, **json.loads((Path(folder) / f"{metrics}.json").read_text())})
        content = {"device": device_name(), "commit": commit(), "runs": runs}
        (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
        print(f"seed {seed}: exit code {code}", flush=True)
    return max(run["exit_code"] for run in runs)


if __name__ == "__main__":
    sys.exit(main())
