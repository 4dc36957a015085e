"""Run the conformance suite for every adapter of vlmkernels, and write its results and the tables of docs/conformance.md.

    python tools/conformance.py [ADAPTER ...]

Each adapter runs in a process of its own, because some projects patch torch or transformers when they are imported. Without
arguments all adapters run, and bench/results/conformance.json and the tables are written; with arguments only these run.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vlmkernels.conformance.contract import ERROR, FAIL, NOT_APPLICABLE
from vlmkernels.conformance.loading import names
from vlmkernels.conformance.page import text_table
from vlmkernels.conformance.report import Report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "conformance.json"
PROJECTS = ROOT / ".venv" / "conformance"  # where `make conformance` installs other projects
TIMEOUT_S = 3600  # a limit for an adapter that hangs, also on a busy machine


def run(name: str, folder: Path) -> tuple[dict, str]:
    """Return the report on an adapter, and a line about the run."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--conformance", name]
    path = os.pathsep.join([str(ROOT), str(PROJECTS)])
    done = subprocess.run(
        [*command, "--conformance-output", str(folder / name)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    output = folder / name / "conformance.json"
    if not output.exists():
        raise RuntimeError(f"{name} left no report:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    last = done.stdout.strip().splitlines()[-1].strip("= ")
    return json.loads(output.read_text()), f"{name}: {last} ({time.perf_counter() - start:.0f} s with imports)"


def main() -> None:
    chosen = sys.argv[1:] or names()
    reports, failed = [], []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, future in {name: pool.submit(run, name, Path(folder)) for name in chosen}.items():
            try:
                report, line = future.result()
            except (RuntimeError, subprocess.TimeoutExpired) as error:  # the reports of the others are printed
                failed.append(name)
                line = f"{name}: {error}"
            else:
                reports.append(report)
            print(line, flush=True)
    report = Report.from_dicts(reports)
    print(text_table(report))
    if failed:
        sys.exit(f"no report on {', '.join(failed)}: no file was written")
    if not sys.argv[1:]:
        content = report.as_dict()
        # What the page does not show: parts that a project does not have, and scripts of documented differences.
        content["cells"] = [cell for cell in content["cells"] if [*cell["counts"]] != [NOT_APPLICABLE]]
        for cell in content["cells"]:
            del cell["seconds"]  # which differ in each run
            for status, first in cell["first"].items():
                first["reproduction"] *= status in (FAIL, ERROR)
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")
        subprocess.run([sys.executable, ROOT / "bench" / "tables.py"], check=True)


if __name__ == "__main__":
    main()
