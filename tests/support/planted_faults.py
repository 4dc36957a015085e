"""Recorded runs of the demo with planted faults and without, as bench/doctor_faults.py trimmed them."""

import json
from pathlib import Path

RUNS = Path(__file__).parent / "doctor_runs"


def names() -> list[str]:
    return sorted(path.stem for path in RUNS.glob("*.json"))


def write_run(name: str, folder: Path) -> Path:
    """Write a recorded run to a folder, as the trainer does, and return the folder."""
    recorded = json.loads((RUNS / f"{name}.json").read_text())
    metrics = recorded["metrics"]
    entries = [dict(zip(metrics, values, strict=True)) for values in zip(*metrics.values(), strict=True)]
    (folder / "completions").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (folder / "run.json").write_text(json.dumps({"arguments": recorded["arguments"]}))
    for step, groups in recorded["completions"].items():
        (folder / "completions" / f"step-{int(step):06d}.json").write_text(json.dumps({"step": int(step), "groups": groups}))
    return folder
