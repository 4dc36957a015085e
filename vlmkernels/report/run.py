"""A training run as its folder tells it, finished, running or killed."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from vlmkernels.ops.checks import require
from vlmkernels.record.completions import stored
from vlmkernels.record.files import ABOUT_FILE, COMPLETIONS_FOLDER, METRICS_FILE, STATE_FILE
from vlmkernels.report.curves import Point


@dataclass(frozen=True)
class Run:
    """entries: of the log, by step; source: the file they come from. about: what run.json holds, or nothing. completions: files
    by step."""

    folder: Path
    source: Path
    entries: list[dict]
    about: dict
    completions: dict[int, Path]

    @classmethod
    def read(cls, folder: str | Path) -> "Run":
        """Whatever a run has left in its ``output_dir`` so far.

        Raises:
            ValueError: there is no such folder, no log in it, or not one that can be read.
        """
        folder = Path(folder)
        require(folder.is_dir(), "RUN", "be an existing folder", folder)
        if (source := folder / METRICS_FILE).exists():
            entries = read_lines(source)
        else:
            source = _newest_state(folder)
            entries = read_state(source)
        entries = sorted(entries, key=lambda entry: entry["step"])
        return cls(folder, source, entries, _read_about(folder / ABOUT_FILE), stored(folder / COMPLETIONS_FOLDER))

    @property
    def step(self) -> int:
        return max((entry["step"] for entry in self.entries), default=0)

    @property
    def is_finished(self) -> bool:
        return any("train_runtime" in entry for entry in self.entries)

    def curves(self) -> dict[str, list[Point]]:
        """Each metric's values by step, as they were logged."""
        return curves_of(self.entries)


def curves_of(entries: list[dict]) -> dict[str, list[Point]]:
    curves: dict[str, list[Point]] = {}
    for entry in entries:
        for name, value in entry.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step":
                curves.setdefault(name, []).append(Point(entry["step"], value))
    return curves


def _checked(entry, place: str) -> dict:
    step = entry.get("step") if isinstance(entry, dict) else None
    whole = isinstance(step, int) and not isinstance(step, bool)
    require(whole, place, "be an object with a whole number step", json.dumps(entry)[:80])
    named = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
    return {name: named.get(value, value) if isinstance(value, str) else value for name, value in entry.items()}


def read_lines(path: Path) -> list[dict]:
    """The entries of a metrics.jsonl; a last line that is not whole yet is passed over."""
    entries, lines = [], path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            if number == len(lines):  # no newline after it
                break
            raise ValueError(f"line {number} of {path} must be JSON, got {line[:80]!r}") from None
        entries.append(_checked(entry, f"line {number} of {path}"))
    return entries


def read_state(path: Path) -> list[dict]:
    """The log in a trainer_state.json, or in JSON with a list ``log_history``."""
    try:
        history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"log must be a {STATE_FILE} with log_history, got {path} ({error!r})") from error
    require(isinstance(history, list), "log_history", "be a list", type(history).__name__)
    return [_checked(entry, f"log_history of {path}") for entry in history]


def _newest_state(folder: Path) -> Path:
    """The trainer_state.json of a run that has no metrics.jsonl."""
    if (path := folder / STATE_FILE).exists():
        return path
    found = {int(path.parent.name[11:]): path for path in folder.glob(f"checkpoint-*/{STATE_FILE}") if _is_number(path)}
    names = sorted(path.name for path in folder.iterdir())
    listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    rule = f"be the output_dir of a training run, with {METRICS_FILE}, or with {STATE_FILE} in it or in a checkpoint"
    require(bool(found), "RUN", rule, f"{folder} with {listed}" if names else f"{folder}, which is empty")
    return found[max(found)]


def _is_number(state: Path) -> bool:
    return state.parent.name.removeprefix("checkpoint-").isdigit()


def _read_about(path: Path) -> dict:
    if not path.exists():
        return {}
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} must be JSON, got {path} ({error})") from error
    require(isinstance(about, dict), path.name, "be an object", type(about).__name__)
    return about
