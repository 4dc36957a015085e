"""Read the files of a training run that has finished, is still running or was killed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmkernels.record.completions import stored_steps
from vlmkernels.record.files import COMPLETIONS_FOLDER, RUN_FILE
from vlmkernels.record.reading import find_logs, read_about, read_log
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
        source = find_logs(folder)[0]
        completions = stored_steps(folder / COMPLETIONS_FOLDER)
        return cls(folder, source, read_log(source), read_about(folder / RUN_FILE), completions)

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
