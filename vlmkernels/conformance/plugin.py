"""The pytest plugin: each case of a contract is a test. ``vlmkernels_pytest`` registers it if ``--conformance`` is given."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vlmkernels.conformance.adapter import Adapter
from vlmkernels.conformance.contract import (
    DOCUMENTED,
    NEEDS_CUDA,
    NOT_APPLICABLE,
    PASS,
    Case,
    Contract,
    Result,
    cases_of,
    run_case,
)
from vlmkernels.conformance.loading import create, find
from vlmkernels.conformance.page import html_page, text_table
from vlmkernels.conformance.report import Report, version
from vlmkernels.conformance.suite import all_contracts
from vlmkernels.record.files import write_atomic


class Failure(Exception):
    """A case that failed; the exception holds its result."""

    def __init__(self, result: Result) -> None:
        super().__init__(result.message)
        self.result = result


Location = tuple[str, None, str]


def location(item: pytest.Item) -> Location:
    """What pytest prints in place of a file, a line and a name: the adapter and the case."""
    assert item.parent is not None
    return item.parent.name, None, f"{item.parent.name}::{item.name}"


class Check(pytest.Item):
    """A case of a contract for one adapter. index: its place in the report."""

    index: int

    def __init__(self, *, adapter: Adapter, contract: Contract, case: Case | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.adapter, self.contract, self.case = adapter, contract, case
        self.add_marker(pytest.mark.filterwarnings("default"))  # a project may make warnings errors

    def runtest(self) -> None:
        result = run_case(self.adapter, self.contract, self.case)
        self.user_properties.append(("conformance", (self.index, [*result])))
        if result.status in (NOT_APPLICABLE, NEEDS_CUDA):
            pytest.skip(f"{result.status}: {result.message}")
        if result.status == DOCUMENTED:
            pytest.xfail(f"documented: {result.message}")
        if result.status != PASS:
            raise Failure(result)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if not isinstance(excinfo.value, Failure):
            return super().repr_failure(excinfo, style)
        result = excinfo.value.result
        lines = [f"{result.contract}: {self.contract.rule}", f"{result.status}: {result.message}"]
        lines += [f"source: {self.contract.source}", f"tolerance: {self.contract.tolerance}", "", result.reproduction]
        return "\n".join(lines)

    def reportinfo(self) -> Location:
        return location(self)


class NotLoaded(pytest.Item):
    """An adapter that cannot be loaded."""

    def __init__(self, *, error: Exception, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.error = error

    def runtest(self) -> None:
        raise self.error

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        return str(self.error)

    def reportinfo(self) -> Location:
        return location(self)


class AdapterChecks(pytest.Collector):
    """The checks of one adapter."""

    def __init__(self, *, adapter: Adapter | Exception, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.adapter = adapter

    def collect(self) -> Iterator[pytest.Item]:
        if isinstance(self.adapter, Exception):
            yield self.item(NotLoaded, "load", error=self.adapter)
            return
        for each in all_contracts():
            for case in cases_of(self.adapter, each):
                name = each.name if case is None else f"{each.name}[{case.id}]"
                yield self.item(Check, name, adapter=self.adapter, contract=each, case=case)

    def item(self, cls: type[pytest.Item], name: str, **kwargs: Any) -> pytest.Item:
        # --lf looks up ids that pytest parses from text. The id that it makes from a name with brackets is not equal to these.
        return cls.from_parent(self, name=name, nodeid=f"{self.nodeid}::{name}", **kwargs)


class Conformance:
    """Replaces the collection of tests by the checks of the adapters, and writes the report."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        if config.args_source is pytest.Config.ArgsSource.ARGS:
            got = " ".join(config.args)
            raise pytest.UsageError(f"--conformance runs without test files, and -k selects cases; got {got}")
        self.folder = Path(config.getoption("conformance_output")).absolute()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise pytest.UsageError(f"conformance-output must be a folder that can be written, got {self.folder}") from error
        self.adapters: dict[str, Adapter | Exception] = {}
        for source in config.getoption("conformance"):
            self.load(source)
        self.results: list[tuple[int, Result]] = []
        self.report: Report | None = None

    def load(self, source: str) -> None:
        """Add the adapters of a file or name, and those that cannot be loaded."""
        try:
            found = find(source)
        except FileNotFoundError as error:
            raise pytest.UsageError(str(error)) from error
        except (ImportError, TypeError) as error:
            self.adapters[source] = error
            return
        for name, cls in found.items():
            try:
                adapter = create(cls, name)
                if adapter.name in self.adapters:
                    raise TypeError(f"{cls.__name__}.name must differ from those of other adapters, got {adapter.name!r}")
                self.adapters[adapter.name] = adapter
            except TypeError as error:
                self.adapters[name] = error

    def pytest_report_header(self) -> str:
        return "conformance: " + ", ".join(
            " ".join([name, *map(version, each.packages[:1])]) if isinstance(each, Adapter) else f"{name} (not loaded)"
            for name, each in self.adapters.items()
        )

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self, session: pytest.Session) -> bool | None:
        if self.config.pluginmanager.hasplugin("dsession"):  # the controller of pytest-xdist: its workers collect
            return None
        session.items = []
        for name, adapter in self.adapters.items():
            items: list[pytest.Item | pytest.Collector] = []
            items += AdapterChecks.from_parent(session, name=name, nodeid=name, adapter=adapter).collect()
            report = pytest.CollectReport(name, "passed", None, items)
            self.config.hook.pytest_collectreport(report=report)  # for the number of tests in the terminal
            session.items += (item for item in items if isinstance(item, pytest.Item))
        for index, item in enumerate(session.items):
            if isinstance(item, Check):
                item.index = index
        self.config.hook.pytest_collection_modifyitems(session=session, config=self.config, items=session.items)
        session.testscollected = len(session.items)
        self.config.hook.pytest_collection_finish(session=session)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            properties: dict[str, Any] = dict(report.user_properties)
            if "conformance" in properties:
                index, values = properties["conformance"]
                self.results.append((index, Result(*values)))

    def pytest_sessionfinish(self) -> None:
        if self.config.getoption("collectonly") or hasattr(self.config, "workerinput"):  # a worker of pytest-xdist
            return
        self.report = Report.new(self.adapters, (result for _, result in sorted(self.results)))
        write_atomic(self.folder / "conformance.json", json.dumps(self.report.as_dict(), indent=1) + "\n")
        write_atomic(self.folder / "conformance.html", html_page(self.report))

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.report:
            terminalreporter.section("conformance")
            terminalreporter.write_line(text_table(self.report))
            terminalreporter.write_line(f"written to {self.folder}/conformance.json and conformance.html")
