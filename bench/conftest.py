"""Every benchmark run ends in its tables and leaves them in bench/results/."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent))

import harness
import pytest

if importlib.util.find_spec("pytest_benchmark") is None:

    @pytest.fixture
    def benchmark():
        """Where pytest-benchmark is not installed: the tables and results are the harness's own."""
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
