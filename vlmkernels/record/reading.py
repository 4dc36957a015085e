"""Read what a run wrote: ``metrics.jsonl``, ``trainer_state.json`` and ``run.json``, of a run that may be running or killed."""

import json
import math
from pathlib import Path
from typing import Any

from vlmkernels.record.files import METRICS_FILE, STATE_FILE


def _checked(entry: Any, place: str) -> dict[str, Any]:
    """Check a log entry, and convert "NaN" and "Infinity" to floats. ``place``: the entry's position, for the error message."""
    step = entry.get("step") if isinstance(entry, dict) else None
    if not isinstance(step, int) or isinstance(step, bool):
        raise ValueError(f"{place} must be an object with an integer step, got {json.dumps(entry)[:80]}")
    named = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
    return {name: named.get(value, value) if isinstance(value, str) else value for name, value in entry.items()}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the entries of a metrics.jsonl. An incomplete last line is ignored."""
    entries, lines = [], path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            if number == len(lines):  # not followed by a newline, so it may be half-written
                break
            raise ValueError(f"line {number} of {path} must be JSON, got {line[:80]!r}") from None
        entries.append(_checked(entry, f"line {number} of {path}"))
    return entries


def read_state(path: Path) -> list[dict[str, Any]]:
    """Read the log from a trainer_state.json, or from any JSON file with a list ``log_history``."""
    try:
        history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"log must be a JSON file with log_history, such as {STATE_FILE}, got {path} ({error!r})") from error
    if not isinstance(history, list):
        raise ValueError(f"log_history must be a list, got {type(history).__name__}")
    return [_checked(entry, f"log_history of {path}") for entry in history]


def checkpoints(folder: Path) -> dict[int, Path]:
    """Return the checkpoints of a run by step, in ascending order."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*") if path.is_dir()}
    return dict(sorted((int(step), path) for path, step in steps.items() if step.isdecimal()))


def find_logs(folder: Path) -> list[Path]:
    """Return the files with the log of a run, the newest first: ``metrics.jsonl``, else each ``trainer_state.json``.

    Raises:
        ValueError: the folder does not exist, or has no such file.
    """
    if not folder.is_dir():
        raise ValueError(f"RUN must be an existing folder, got {folder}")
    if (metrics := folder / METRICS_FILE).exists():
        return [metrics]
    states = [folder / STATE_FILE, *(path / STATE_FILE for path in reversed(checkpoints(folder).values()))]
    if found := [path for path in states if path.exists()]:
        return found
    names = sorted(path.name for path in folder.iterdir())
    listed = f"which contains {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "which is empty"
    raise ValueError(
        f"RUN must be the output_dir of a training run and contain {METRICS_FILE}, {STATE_FILE} or a checkpoint,"
        f" got {folder}, {listed}"
    )


def is_complete(path: Path) -> bool:
    """Whether the last line of a file of JSON objects can be read."""
    last = path.read_bytes().rpartition(b"\n")[2].strip()
    try:
        return not last or isinstance(json.loads(last), dict)
    except ValueError:
        return False


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the entries of a log that ``find_logs`` found, sorted by step."""
    entries = read_lines(path) if path.name == METRICS_FILE else read_state(path)
    return sorted(entries, key=lambda entry: entry["step"])


def read_about(path: Path) -> dict[str, Any]:
    """Read a run.json. Returns an empty dict if the file does not exist."""
    if not path.exists():
        return {}
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} must be JSON, got {path} ({error})") from error
    if not isinstance(about, dict):
        raise ValueError(f"{path.name} must be an object, got {type(about).__name__}")
    return about
