"""The report of a run: for each project and contract, the outcome of its cases."""

import importlib.metadata
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vlmkernels.conformance.adapter import Adapter
from vlmkernels.conformance.contract import DOCUMENTED, ERROR, FAIL, STATUSES, Result, all_contracts

LIBRARIES = ("vlmkernels", "torch", "transformers")
# The status of several cases together is the first of these that one of them has.
ORDER = (FAIL, ERROR, DOCUMENTED, *(status for status in STATUSES if status not in (FAIL, ERROR, DOCUMENTED)))
SYMBOLS = dict(zip(STATUSES, ("✓", "✗", "!", "d", "–", "C"), strict=True))
LEGEND = {
    "✓": "all cases pass",
    "✗ a/b": "a of b cases fail",
    "! a/b": "the adapter raises an error in a of b cases",
    "d": "differs, and the documentation of the project says so",
    "–": "not applicable: the project does not have this part, or does not run it through a function that a test can call",
    "C": "needs CUDA",
}


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@dataclass
class Cell:
    """The outcome of the cases of one contract for one project."""

    counts: Counter[str] = field(default_factory=Counter)  # of each status
    seconds: float = 0.0
    first: dict[str, Result] = field(default_factory=dict)  # of each status except "pass": the smallest case

    def add(self, result: Result) -> None:
        self.counts[result.status] += 1
        self.seconds += result.seconds
        if result.message:
            self.first.setdefault(result.status, result)

    @property
    def status(self) -> str:
        return next(status for status in ORDER if self.counts[status])

    @property
    def text(self) -> str:
        """A symbol of ``SYMBOLS``; with the numbers of cases if some fail."""
        symbol = SYMBOLS[self.status]
        return f"{symbol} {self.counts[self.status]}/{self.counts.total()}" if self.status in (FAIL, ERROR) else symbol


@dataclass
class Report:
    """The outcomes of all contracts for some projects."""

    versions: dict[str, str]  # of Python and of libraries
    projects: dict[str, dict[str, str]]  # name -> the versions of its packages
    not_loaded: dict[str, str]  # source -> the error
    results: list[Result]  # in the order of contracts, with the smallest cases first

    @classmethod
    def new(cls, adapters: Mapping[str, Adapter | Exception], results: list[Result]) -> "Report":
        versions = {"Python": platform.python_version()} | {name: version(name) for name in LIBRARIES}
        loaded = {name: each.packages for name, each in adapters.items() if isinstance(each, Adapter)}
        projects = {name: {package: version(package) for package in packages} for name, packages in loaded.items()}
        return cls(versions, projects, {name: str(e) for name, e in adapters.items() if isinstance(e, Exception)}, results)

    @property
    def cells(self) -> dict[tuple[str, str], Cell]:
        cells: dict[tuple[str, str], Cell] = {}
        for result in self.results:
            cells.setdefault((result.adapter, result.contract), Cell()).add(result)
        return cells

    def as_dict(self) -> dict[str, Any]:
        """Return the report as a value for JSON."""
        contracts = [{"name": c.name, "rule": c.rule, "source": c.source, "tolerance": c.tolerance} for c in all_contracts()]
        results = [result._asdict() | {"seconds": round(result.seconds, 4)} for result in self.results]
        head = {"versions": self.versions, "projects": self.projects, "not_loaded": self.not_loaded}
        return head | {"contracts": contracts, "results": results}

    @classmethod
    def from_dicts(cls, values: Iterable[dict[str, Any]]) -> "Report":
        """Join the results of several runs."""
        report = cls({}, {}, {}, [])
        for value in values:
            report.versions |= value["versions"]
            report.projects |= value["projects"]
            report.not_loaded |= value["not_loaded"]
            report.results += [Result(**result) for result in value["results"]]
        return report
