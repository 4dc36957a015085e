"""Every benchmark run prints its tables at the end and writes them to bench/results/."""

import importlib.util
from types import SimpleNamespace

import harness
import pytest

if importlib.util.find_spec("pytest_benchmark") is None:

    @pytest.fixture
    def benchmark():
        """Stands in for pytest-benchmark, if that is not installed. Tables and results come from ``harness``."""
        return SimpleNamespace(extra_info={}, pedantic=lambda run, rounds=1: None)


def pytest_configure(config):
    config.option.benchmark_disable_gc = True


def pytest_terminal_summary(terminalreporter):
    written = harness.write_results()
    if written is None:
        return
    path, records = written
    terminalreporter.section(f"{harness.device_name()}, commit {harness.commit()}")
    for case, rows in records.items():
        terminalreporter.write_line(f"\n{case}\n")
        for line in harness.table(rows):
            terminalreporter.write_line(line)
    terminalreporter.write_line(f"\nwritten to {path}")
