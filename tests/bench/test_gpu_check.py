"""bench/gpu_check.py without a GPU: every stage starts, stays within its budget and writes results as they come."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu_check.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def stage(script, tmp_path):
    return script.Stage("correct", tmp_path, 60, dry=True)


def test_a_dry_run(tmp_path):
    command = [sys.executable, str(SCRIPT), "correct", "why", "--dry-run"]
    done = subprocess.run(command, env={**os.environ, "GPU_OUT": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "outcomes.jsonl").read_text().splitlines()]
    assert {row["outcome"] for row in rows} == {"passed"}
    assert any("test_equals_masked_scatter" in row["test"] for row in rows)
    assert "tests/ops/test_merge_image_features.py" in done.stdout
    assert "grpo_loss, triton: finite" in (tmp_path / "why.log").read_text()


def test_outcomes_are_written_as_they_come(script, stage, tmp_path):
    """Includes a run that is cut off, and errors of set-up and collection."""
    (tmp_path / "test_some.py").write_text(
        "import pytest, time\n"
        "@pytest.fixture\ndef broken(): raise ValueError('no fixture')\n"
        "def test_one(): pass\n"
        "def test_two(): assert 1 == 2, 'two'\n"
        "def test_three(broken): pass\n"
        "def test_four(): pytest.skip('not here')\n"
        "def test_five(): time.sleep(60)\n"
    )
    (tmp_path / "test_wrong.py").write_text("import no_such_module\n")
    outcomes = tmp_path / "outcomes.jsonl"
    options = ["-q", "-p", "no:cacheprovider", "-p", "support.gpu_session", "--outcomes", outcomes]
    options.append("--continue-on-collection-errors")
    assert stage.run([sys.executable, "-m", "pytest", *options, "--rootdir", tmp_path, tmp_path], 20) is None
    rows = {row["test"].rpartition("::")[2]: row for row in script.read_outcomes(outcomes)}
    assert {name: row["outcome"] for name, row in rows.items() if name != "test_five"} == {
        "test_wrong.py": "failed", "test_one": "passed", "test_two": "failed", "test_three": "failed", "test_four": "skipped",
    }  # fmt: skip
    assert "two" in rows["test_two"]["message"]
    assert "no fixture" in rows["test_three"]["message"]
    assert "not here" in rows["test_four"]["message"]
    script.report(stage, list(rows.values()))
    assert "FAILED" in (tmp_path / "correct.log").read_text()


def test_a_stage_without_time_starts_nothing(script, tmp_path):
    stage = script.Stage("fast", tmp_path, 1, dry=True)
    assert stage.run([sys.executable, "-c", "print('started')"], 60) is None
    assert "no time left" in (tmp_path / "fast.log").read_text()


def test_the_tables_name_what_exists(script):
    assert {*script.TESTS} - {"*"} <= {*script.test_files()}
    spec = importlib.util.spec_from_file_location("kernel_cases", SCRIPT.with_name("kernel_cases.py"))
    cases = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cases)
    assert {case for case, _, _ in script.PROFILES} <= cases.CASES.keys()
    assert {*script.SANITIZED} <= cases.CASES.keys()
