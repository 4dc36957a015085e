"""What the rules see of a run, and the statistics that they compare."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

WINDOW = 5  # logs whose median is compared with the median of the first logs


class Log(NamedTuple):
    """One logged value."""

    step: int
    value: float


@dataclass
class Run:
    """The history of a training run.

    Attributes:
        steps: entries of the log in ascending order, each with "step", as in ``metrics.jsonl``.
        completions: step -> groups of completions, as in ``completions/step-*.json`` (``vlmkernels.record.completions``).
        arguments: the arguments of the trainer, empty if they are unknown.
        checkpoints: steps of the checkpoints that exist.
        source: the file that the log was read from, or None for a run in training.
        notes: what was ignored while the run was read.
    """

    steps: list[dict[str, Any]] = field(default_factory=list)
    completions: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    checkpoints: list[int] = field(default_factory=list)
    source: Path | None = None
    notes: list[str] = field(default_factory=list)

    def logs(self, name: str) -> list[Log]:
        """Return the values of a metric that are finite."""
        values = ((entry["step"], entry.get(name)) for entry in self.steps)
        return [Log(step, value) for step, value in values if is_number(value) and math.isfinite(value)]

    def names(self, pattern: str) -> list[str]:
        """Return the names of the metrics that match a pattern such as ``rewards/*/mean``."""
        return sorted({name for entry in self.steps for name in entry if fnmatchcase(name, pattern)})

    def rows(self, since: int = 0) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
        """Yield (step, group, completion) of every stored completion since a step."""
        for step in sorted(self.completions):
            if step >= since:
                for group in self.completions[step]:
                    for row in group["completions"]:
                        yield step, group, row


def is_number(value: Any) -> bool:
    """Whether a value of a log is a number; it may be NaN or infinite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def noise(values: Sequence[float]) -> float:
    """Return the standard deviation of the values around their trend.

    It is estimated from the median absolute difference of neighbors, so that neither a trend nor single jumps increase it.
    """
    differences = [abs(b - a) for a, b in zip(values, values[1:], strict=False)]
    return 1.4826 * median(differences) / math.sqrt(2) if differences else 0.0
