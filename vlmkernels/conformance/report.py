"""The report of a run: for each project and contract, the outcome of its cases."""

import importlib.metadata
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vlmkernels.conformance.adapter import Adapter
from vlmkernels.conformance.contract import DOCUMENTED, ERROR, FAIL, NEEDS_CUDA, NOT_APPLICABLE, PASS, Result
from vlmkernels.conformance.suite import all_contracts

LIBRARIES = ("vlmkernels", "torch", "transformers")


@dataclass(frozen=True)
class Status:
    """How a report shows the status of a case."""

    symbol: str
    meaning: str
    counted: bool = False  # whether the symbol is followed by the numbers of such cases and of all cases


# Several cases together have the first of these that one of them has.
STATUSES = {
    FAIL: Status("✗", "of the cases fail", counted=True),
    ERROR: Status("!", "of the cases raise an error that the interface does not allow", counted=True),
    DOCUMENTED: Status("d", "differs, as the documentation of the project says"),
    PASS: Status("✓", "all cases pass"),
    NEEDS_CUDA: Status("C", "needs CUDA"),
    NOT_APPLICABLE: Status("–", "not applicable: the project does not have this, or not in code that runs by itself"),
}
LEGEND = {row.symbol + " a/b" * row.counted: row.meaning for row in STATUSES.values()}


def version(package: str) -> str:
    """Return the version of a distribution."""
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
        """Add a case. The smallest cases come first."""
        self.counts[result.status] += 1
        self.seconds += result.seconds
        if result.status != PASS:
            self.first.setdefault(result.status, result)

    @property
    def status(self) -> str:
        """The status of the cases together; "" if none was run."""
        return next((status for status in STATUSES if self.counts[status]), "")

    @property
    def text(self) -> str:
        """The symbol of the status, with the numbers of cases if some fail; empty if none was run."""
        if not self.status:
            return ""
        row = STATUSES[self.status]
        return f"{row.symbol} {self.counts[self.status]}/{self.counts.total()}" if row.counted else row.symbol


@dataclass
class Report:
    """The outcomes of all contracts for some projects."""

    versions: dict[str, str] = field(default_factory=dict)  # of Python and of libraries
    projects: dict[str, dict[str, str]] = field(default_factory=dict)  # name -> the versions of its packages
    not_loaded: dict[str, str] = field(default_factory=dict)  # source of an adapter -> the error
    cells: dict[tuple[str, str], Cell] = field(default_factory=dict)  # (project, contract)

    @classmethod
    def new(cls, adapters: Mapping[str, Adapter | Exception], results: Iterable[Result]) -> "Report":
        """Make the report of a run. results: the smallest case of each contract first."""
        report = cls({"Python": platform.python_version()} | {name: version(name) for name in LIBRARIES})
        for name, adapter in adapters.items():
            if isinstance(adapter, Adapter):
                report.projects[name] = {package: version(package) for package in adapter.packages}
            else:
                report.not_loaded[name] = str(adapter)
        for result in results:
            report.cells.setdefault((result.adapter, result.contract), Cell()).add(result)
        return report

    def cell(self, project: str, contract: str) -> Cell:
        """Return the outcome of a contract for a project."""
        return self.cells.get((project, contract), Cell())

    def as_dict(self) -> dict[str, Any]:
        """Return the report as a value for JSON."""
        return {
            "versions": self.versions,
            "projects": self.projects,
            "not_loaded": self.not_loaded,
            "contracts": {c.name: {"rule": c.rule, "source": c.source, "tolerance": c.tolerance} for c in all_contracts()},
            "cells": [
                {
                    "project": project,
                    "contract": contract,
                    "counts": dict(cell.counts),
                    "seconds": round(cell.seconds, 3),
                    "first": {
                        status: {"case": first.case, "message": first.message, "reproduction": first.reproduction}
                        for status, first in cell.first.items()
                    },
                }
                for (project, contract), cell in self.cells.items()
            ],
        }

    @classmethod
    def from_dicts(cls, values: Iterable[dict[str, Any]]) -> "Report":
        """Join reports of different projects."""
        report = cls()
        for value in values:
            report.versions |= value["versions"]
            report.projects |= value["projects"]
            report.not_loaded |= value["not_loaded"]
            for cell in value["cells"]:
                key = cell["project"], cell["contract"]
                first = {status: Result(*key, status=status, **result) for status, result in cell["first"].items()}
                report.cells[key] = Cell(Counter(cell["counts"]), cell.get("seconds", 0.0), first)
        return report
