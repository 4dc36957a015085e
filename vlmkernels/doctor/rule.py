"""A rule, what it finds, and which inputs it lacks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from vlmkernels.doctor.history import WINDOW, Run
from vlmkernels.record.html import Thumbnail

PROBLEM, NOTE = "problem", "note"
COMPLETIONS = "completions"


class Example(NamedTuple):
    """A completion that shows what a rule found, with the first images of its prompt."""

    step: int
    prompt: str
    completion: str
    rewards: dict[str, float | None]
    references: dict[str, str]
    images: tuple[Thumbnail, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """What the check of a rule returns.

    Attributes:
        step: the step since which the rule holds.
        text: a sentence with the numbers.
        metric: the metric whose curve shows it, if there is one.
        value: the number that the rule compared.
        baseline: the number it was compared with.
        example: a completion that shows it.
        severity: ``PROBLEM``, or ``NOTE`` for what may be intended. Only problems change the exit code of the command.
    """

    step: int
    text: str
    metric: str | None = None
    value: float | None = None
    baseline: float | None = None
    example: Example | None = None
    severity: str = PROBLEM


@dataclass(frozen=True)
class Finding:
    """A rule that holds for a run. ``evidence`` is the sentence; the other attributes are those of ``Evidence``."""

    rule: str
    step: int
    evidence: str
    example: Example | None
    remedy: str
    severity: str = PROBLEM
    metric: str | None = None
    value: float | None = None
    baseline: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Return an object for JSON, without images."""
        shown = self.example and {name: value for name, value in self.example._asdict().items() if name != "images"}
        return {**vars(self), "example": shown}


@dataclass(frozen=True)
class Rule:
    """A rule.

    Attributes:
        name: the name of what it finds.
        meaning: when it holds.
        remedy: what to change.
        needs: its inputs: names of metrics with * for any name, or ``completions``. "a or b": one suffices.
        check: returns what the rule found, or None.
        source: where its threshold comes from.
        steps: the number of steps of a metric that it needs, of which ``Curve.logs`` logs are enough.
    """

    name: str
    meaning: str
    remedy: str
    needs: tuple[str, ...]
    check: Callable[[Run], Evidence | None]
    source: str
    steps: int = 2 * WINDOW

    def finding(self, run: Run) -> Finding | None:
        """Return what the rule finds, or None if it finds nothing or lacks an input."""
        if self.lacks(run) or not (found := self.check(run)):
            return None
        shown = found.severity, found.metric, found.value, found.baseline
        return Finding(self.name, found.step, found.text, found.example, self.remedy, *shown)

    def lacks(self, run: Run) -> str | None:
        """Say which input a run lacks; None if the rule can be checked."""
        for need in self.needs:
            reasons = [self._lacks(run, name) for name in need.split(" or ")]
            if all(reasons):
                return "; ".join(filter(None, reasons))
        return None

    def _lacks(self, run: Run, name: str) -> str | None:
        if name == COMPLETIONS:
            return None if run.completions else "no completions are stored (log_completions=True)"
        if not (names := run.names(name)):
            return f"{name} is not logged"
        curve = max((run.curve(found) for found in names), key=len)
        if curve.covers(self.steps):
            return None
        return f"{name} has {len(curve)} of at least {curve.logs(self.steps)} logs"
