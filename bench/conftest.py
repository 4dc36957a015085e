"""Every benchmark run ends in its tables and leaves them in bench/results/."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import harness


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
