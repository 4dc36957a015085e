"""What the rules see of a run, and the statistics that they compare."""

import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from statistics import fmean, median, median_low
from typing import Any

from vlmkernels.doctor import trend

WINDOW = 5  # steps at the beginning whose median is the baseline, and the smallest number of steps that is compared with it
MIN_LOGS = 2  # of a window, if a log is the mean of several steps
MAX_WINDOW, WINDOWS = 50, 20  # a longer run is compared in windows of a twentieth of its logs, of at most 50 logs
TENTHS, MIN_TENTHS = 10, 6  # parts of a run whose levels are compared, and their smallest number
# The smallest change of a reward that matters, and that of a collapse, in standard deviations between completions. Of a reward
# that half of the completions get, they are 0.05 and 0.15.
SMALL, LARGE = 0.1, 0.3


@dataclass
class Run:
    """The history of a training run.

    Attributes:
        steps: entries of the log in ascending order, each with "step", as in ``metrics.jsonl``.
        completions: step -> groups of completions, as in ``completions/step-*.json`` (``vlmkernels.record.completions``).
        arguments: the arguments of the trainer, empty if they are unknown.
        checkpoints: steps of the checkpoints that exist.
        source: the file that the log was read from, or None for a run in training.
        notes: what was ignored or is missing.
    """

    steps: list[dict[str, Any]] = field(default_factory=list)
    completions: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    checkpoints: list[int] = field(default_factory=list)
    source: Path | None = None
    notes: list[str] = field(default_factory=list)
    _curves: dict[str, tuple[int, "Curve"]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def curve(self, name: str) -> "Curve":
        """Return the finite values of a metric."""
        count, curve = self._curves.get(name, (-1, Curve([], [])))
        if count != len(self.steps):  # steps have been added
            logs = [(entry["step"], entry[name]) for entry in self.steps if is_finite(entry.get(name))]
            curve = Curve([step for step, _ in logs], [value for _, value in logs])
            self._curves[name] = len(self.steps), curve
        return curve

    def names(self, pattern: str) -> list[str]:
        """Return the names of the metrics that match a pattern such as ``rewards/*/mean``."""
        return sorted(name for name in set(itertools.chain.from_iterable(self.steps)) if fnmatchcase(name, pattern))

    def improved(self, step: int, name: str = "reward") -> bool:
        """Whether a metric has visibly risen from its beginning to a step; False if it is not logged."""
        return self.curve(name).has_risen(step)

    def spread(self, name: str) -> float:
        """Return the standard deviation between completions of ``reward`` or ``rewards/*/mean``; 0 if it is not logged."""
        spread = self.curve("reward_std" if name == "reward" else name.removesuffix("mean") + "std")
        return fmean(spread.values) if len(spread) else 0.0


def reward_of(metric: str) -> str:
    """Return the name of the reward function of a metric such as ``rewards/NAME/mean``."""
    return metric.removeprefix("rewards/").rpartition("/")[0]


def is_number(value: Any) -> bool:
    """Whether a value of a log is a number, which may be NaN or infinite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether a value of a log is a finite number."""
    return is_number(value) and math.isfinite(value)


@dataclass(frozen=True)
class Curve:
    """The values of a metric with their steps, in ascending order."""

    steps: list[int]
    values: list[float]

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def every(self) -> int:
        """The number of steps between logs, of which a log is the mean."""
        gaps = [after - before for before, after in itertools.pairwise(self.steps)]
        return max(int(median(gaps)), 1) if gaps else 1

    def logs(self, steps: int) -> int:
        """Return the number of logs that cover ``steps`` steps: of each ``WINDOW`` steps at least ``MIN_LOGS`` logs."""
        if steps < WINDOW:
            return steps
        return math.ceil(steps * self.least / WINDOW)

    def covers(self, steps: int) -> bool:
        """Whether there are logs of at least this many steps."""
        return len(self) >= self.logs(steps)

    @property
    def least(self) -> int:
        """The smallest number of logs of a window."""
        return min(max(math.ceil(WINDOW / self.every), MIN_LOGS), WINDOW)

    @property
    def width(self) -> int:
        """The number of logs of a window."""
        return min(max(self.least, len(self) // WINDOWS), MAX_WINDOW)

    @cached_property
    def start(self) -> float:
        """The median of the first window of at least ``WINDOW`` steps."""
        return median(self.values[: self.least])

    @cached_property
    def _trends(self) -> dict[int, trend.Trend]:
        return {}

    def trend(self, count: int) -> trend.Trend | None:
        """Return the trend of the first ``count`` values; None if they are too few."""
        if count < max(self.logs(2 * WINDOW), 3):
            return None
        if count not in self._trends:
            self._trends[count] = trend.fit(self.steps[:count], self.values[:count])
        return self._trends[count]

    def has_risen(self, step: int) -> bool:
        """Whether a gain up to a step is visible, half of which is left in the window."""
        count = self.count(step)
        fits = found.rising if (found := self.trend(count)) else []
        return any(self.window(count) - fit.start >= fit.gain / 2 - 2 * self.noise for fit in fits)

    def has_fallen(self, step: int) -> bool:
        """Whether a loss up to a step is visible, half of which is left in the window."""
        count = self.count(step)
        fits = found.falling if (found := self.trend(count)) else []
        return any(self.window(count) - fit.start <= fit.gain / 2 + 2 * self.noise for fit in fits)

    @cached_property
    def noise(self) -> float:
        """The standard deviation of the values around their trend.

        It is estimated from the median absolute difference of neighbors, so that neither a trend nor a few jumps increase it;
        from the mean absolute difference if most neighbors are equal. Of less than ten logs, whose estimate is uncertain, it is
        increased.
        """
        differences = [abs(b - a) for a, b in itertools.pairwise(self.values)]
        if not differences:
            return 0.0
        uncertainty = max((2 * WINDOW - 1) / len(differences), 1.0)
        return uncertainty * (1.4826 * median(differences) or 1.2533 * fmean(differences)) / math.sqrt(2)

    @cached_property
    def wander(self) -> float:
        """The standard deviation of the level in a tenth of the run around its trend; 0 for a short run.

        It exceeds the noise of a mean of as many values if neighbors deviate together. It is estimated from second differences,
        so that neither a trend nor a few jumps increase it.
        """
        width = max(self.least, len(self) // TENTHS)
        levels = [median(self.values[start : start + width]) for start in range(0, len(self) - width + 1, width)]
        if len(levels) < MIN_TENTHS:
            return 0.0
        bends = [abs(a - 2 * b + c) for a, b, c in zip(levels, levels[1:], levels[2:], strict=False)]
        return 1.4826 * median_low(bends) / math.sqrt(6)

    def window(self, end: int | None = None) -> float:
        """Return the median of the ``width`` values before index ``end``; by default the last ones."""
        end = len(self) if end is None else end
        return median(self.values[max(0, end - self.width) : end])

    def mean(self, end: int, windows: int = 2) -> tuple[float, float]:
        """Return the mean of some windows before index ``end``, and its standard error."""
        values = self.values[max(0, end - windows * self.width) : end]
        return fmean(values), self.noise / math.sqrt(len(values))

    def count(self, step: int) -> int:
        """Return the number of logs up to a step."""
        return bisect_right(self.steps, step)

    def at(self, step: int, default: float) -> float:
        """Return the window up to a step, or the default if nothing was logged up to there."""
        count = self.count(step)
        return self.window(count) if count else default

    def since(self, holds: Callable[[float, int], bool], steps: int = 2 * WINDOW) -> int | None:
        """Return the step since which ``holds(window, step)`` is true without a break up to the end; None if it is false there.

        Args:
            steps: number of steps before the first window that is judged, see ``logs``.
        """
        found = None
        for end in range(len(self), self.logs(steps) - 1, -1):
            if not holds(self.window(end), self.steps[end - 1]):
                break
            found = self.steps[end - 1]
        return found


def correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return the correlation of two sequences with mean 0; 0 if one is constant."""
    norm = math.hypot(*xs) * math.hypot(*ys)
    return sum(x * y for x, y in zip(xs, ys, strict=True)) / norm if norm else 0.0
