"""Read the files of a training run that has finished, is still running or was killed."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmkernels.record.completions import stored_steps
from vlmkernels.record.files import COMPLETIONS_FOLDER, METRICS_FILE, RUN_FILE, STATE_FILE
from vlmkernels.report.curves import Point


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        folder: the run's ``output_dir``.
        source: the file that the log was read from.
        entries: entries of the log, sorted by step.
        about: content of run.json; empty if the file does not exist.
        completions: step -> file with the completions stored at that step.
    """

    folder: Path
    source: Path
    entries: list[dict[str, Any]]
    about: dict[str, Any]
    completions: dict[int, Path]

    @classmethod
    def read(cls, folder: str | Path) -> "Run":
        """Read the files of a run from its ``output_dir``.

        Raises:
            ValueError: the folder does not exist, or has no valid log.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"RUN must be an existing folder, got {folder}")
        if (source := folder / METRICS_FILE).exists():
            entries = read_lines(source)
        else:
            source = _newest_state(folder)
            entries = read_state(source)
        entries = sorted(entries, key=lambda entry: entry["step"])
        return cls(folder, source, entries, _read_about(folder / RUN_FILE), stored_steps(folder / COMPLETIONS_FOLDER))

    @property
    def step(self) -> int:
        """The last step in the log, or 0 if the log is empty."""
        return max((entry["step"] for entry in self.entries), default=0)

    @property
    def is_finished(self) -> bool:
        """Whether training ran to its end. The trainer then logs ``train_runtime``."""
        return any("train_runtime" in entry for entry in self.entries)

    def curves(self) -> dict[str, list[Point]]:
        """Return the curve of each logged metric."""
        return curves_of(self.entries)


def curves_of(entries: list[dict[str, Any]]) -> dict[str, list[Point]]:
    """Return one curve per metric name from the entries of a log. Values that are not numbers are left out."""
    curves: dict[str, list[Point]] = {}
    for entry in entries:
        for name, value in entry.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step":
                curves.setdefault(name, []).append(Point(entry["step"], value))
    return curves


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


def _newest_state(folder: Path) -> Path:
    """Find the newest trainer_state.json of a run: in its folder, else in its newest checkpoint."""
    if (path := folder / STATE_FILE).exists():
        return path
    steps = {path: path.parent.name.removeprefix("checkpoint-") for path in folder.glob(f"checkpoint-*/{STATE_FILE}")}
    found = {int(step): path for path, step in steps.items() if step.isdigit()}
    if not found:
        names = sorted(path.name for path in folder.iterdir())
        listed = f"which contains {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "which is empty"
        raise ValueError(
            f"RUN must be the output_dir of a training run and contain {METRICS_FILE}, {STATE_FILE} or a checkpoint,"
            f" got {folder}, {listed}"
        )
    return found[max(found)]


def _read_about(path: Path) -> dict[str, Any]:
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
