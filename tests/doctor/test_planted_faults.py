"""Every fault that was planted in the demo is found in its recorded run, and nothing in the runs without a fault."""

import json

import pytest
from support.paths import ROOT
from support.planted_faults import names, write_run

from vlmkernels.doctor import PROBLEM, diagnose, read_run

RESULTS = {row["name"]: row for row in json.loads((ROOT / "bench" / "results" / "doctor.json").read_text())["runs"]}
HEALTHY = [name for name in names() if name.startswith("healthy-")]
FAULTS = [name for name in names() if name not in HEALTHY]


def test_the_recorded_runs_are_those_of_the_table():
    assert len(FAULTS) >= 10
    assert len(HEALTHY) == 2
    assert set(FAULTS) == {name for name, row in RESULTS.items() if row["fault"]}
    assert all(row["passed"] for row in RESULTS.values())


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(tmp_path, name):
    found = {finding.rule: finding for finding in diagnose(read_run(write_run(name, tmp_path)))}
    finding = found[RESULTS[name]["rule"]]
    assert finding.severity == PROBLEM
    assert finding.step <= 20


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_has_no_problem(tmp_path, name):
    run = read_run(write_run(name, tmp_path))
    assert len(run.steps) >= 40
    assert [finding for finding in diagnose(run) if finding.severity == PROBLEM] == []
