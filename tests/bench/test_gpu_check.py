"""bench/gpu_check.py without a GPU: every stage starts, stays within its budget and writes results as they come."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import harness
import pytest
import tables

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


def dry_run(tmp_path, *arguments):
    command, environment = [sys.executable, str(SCRIPT), *arguments, "--dry-run"], {**os.environ, "GPU_OUT": str(tmp_path)}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_dry_run(tmp_path):
    done = dry_run(tmp_path, "correct", "why")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "outcomes.jsonl").read_text().splitlines()]
    found = {outcome: {row["test"] for row in rows if row["outcome"] == outcome} for outcome in ("not run", "passed")}
    assert found["not run"] == found["passed"]  # first those of the collection
    assert len(rows) == 2 * len(found["passed"])
    assert any("test_equals_masked_scatter" in test for test in found["passed"])
    assert "tests/ops/test_merge_image_features.py" in done.stdout
    log = (tmp_path / "why.log").read_text()
    assert "grpo_loss, triton: finite" in log
    table = [line.split() for line in log.partition("seconds  result")[2].splitlines()[1:]]
    assert [(row[0], row[-1]) for row in table] == [
        *(("correct", what) for what in ("env", "versions", "extension", "ceilings", "tests")), ("why", "Triton"),
    ]  # fmt: skip


def test_outcomes_are_written_as_they_come(script, stage, tmp_path):
    """Includes a run that is interrupted, and errors of set-up and collection."""
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.fixture\ndef broken(): raise ValueError('no fixture')\n"
        "def test_one(): pass\n"
        "def test_two(): assert 1 == 2, 'two'\n"
        "def test_three(broken): pass\n"
        "def test_four(): pytest.skip('not here')\n"
        "def test_five(): raise KeyboardInterrupt\n"
        "def test_six(): pass\n"
    )
    (tmp_path / "test_wrong.py").write_text("import no_such_module\n")
    outcomes = tmp_path / "outcomes.jsonl"
    options = ["-q", "-p", "no:cacheprovider", "-p", "support.gpu_session", "--outcomes", outcomes]
    options.append("--continue-on-collection-errors")
    assert stage.run("some", [sys.executable, "-m", "pytest", *options, "--rootdir", tmp_path, tmp_path], 60) == 2
    rows = {row["test"].rpartition("::")[2]: row for row in script.read_outcomes(outcomes)}
    assert {name: row["outcome"] for name, row in rows.items()} == {
        "test_wrong.py": "failed", "test_one": "passed", "test_two": "failed", "test_three": "failed", "test_four": "skipped",
        "test_five": "not run", "test_six": "not run",
    }  # fmt: skip
    assert "two" in rows["test_two"]["message"]
    assert "no fixture" in rows["test_three"]["message"]
    assert "not here" in rows["test_four"]["message"]
    script.report(stage, list(rows.values()))
    assert "FAILED" in (tmp_path / "correct.log").read_text()


def test_what_takes_too_long_is_interrupted(script, stage, tmp_path):
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('interrupted')"
    assert stage.run("sleeping", [sys.executable, "-c", code], 3) is None
    assert "\ninterrupted\n---- cut off after" in (tmp_path / "correct.log").read_text()
    assert script.summary([stage]).splitlines()[-1].split()[2:] == ["cut", "off", "sleeping"]


def test_a_stage_without_time_starts_nothing(script, tmp_path):
    stage = script.Stage("fast", tmp_path, 1, dry=True)
    assert stage.run("printing", [sys.executable, "-c", "print('started')"], 60) is None
    assert "no time left" in (tmp_path / "fast.log").read_text()
    assert script.summary([stage]).splitlines()[-1].split() == ["fast", "0.0", "no", "time", "left", "printing"]


def test_nothing_is_left_running(stage, tmp_path):
    """Also not what a process that has ended had started."""
    code = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
    assert stage.run("parent", [sys.executable, "-c", code], 20) == 0
    pid = next(line for line in (tmp_path / "correct.log").read_text().splitlines() if line.isdigit())
    state, end = Path(f"/proc/{pid}/stat"), time.monotonic() + 10
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] not in "ZX":  # a killed process ends soon
        assert time.monotonic() < end
        time.sleep(0.05)


def test_only(script, tmp_path, monkeypatch):
    """Words select test files, benchmarks and cases, each in the order of its table."""
    ran = []
    monkeypatch.setattr(script.Stage, "run", lambda self, name, command, *rest, **more: ran.append((name, command)) or 0)
    monkeypatch.setattr(script, "keep_counts", lambda stage, counts: None)
    for name in ("correct", "fast", "system", "why"):
        script.STAGES[name](script.Stage(name, tmp_path, 99, dry=False, only=("sample", "rotary")))
    names = [name for name, _ in ran]
    tests = next(command for name, command in ran if name == "tests")
    assert [Path(part).stem for part in tests if str(part).startswith("tests/")] == [
        "test_sample_logps", "test_linear_sample_logps", "test_rotary",
    ]  # fmt: skip
    assert [name for name in names if name.startswith("bench_")] == [
        "bench_sample.py bfloat16",
        "bench_vision.py rotary or varlen",
    ]
    assert [name for name in names if name.startswith("ncu")] == ["ncu sample_draw_kernel"]
    of_triton = next(command for name, command in ran if name == "memcheck of Triton kernels")
    assert {*script.SANITIZED} & {*map(str, of_triton)} == {"sample", "rotary"}


def test_a_word_without_a_match_is_an_error(tmp_path):
    done = dry_run(tmp_path, "fast", "--only", "rotary", "linear_atention")
    assert done.returncode == 2
    assert "--only must be part of a name in the stages fast, got 'linear_atention'" in done.stderr


def test_stages_share_the_time(script, tmp_path, monkeypatch):
    """A stage gets at most its own budget, the last one what the others have left."""
    monkeypatch.setenv("GPU_OUT", str(tmp_path))
    monkeypatch.setenv("GPU_BUDGET_S", "1000")
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "correct", "why", "fast"])
    budgets = {}
    monkeypatch.setattr(script, "STAGES", dict.fromkeys(script.STAGES, lambda stage: budgets.update({stage.name: stage.left})))
    script.main()
    assert {name: round(left) for name, left in budgets.items()} == {
        "correct": script.BUDGETS["correct"], "why": script.BUDGETS["why"], "fast": 1000,
    }  # fmt: skip


def test_results_of_several_runs_and_devices(tmp_path, monkeypatch):
    """Files and cases keep the commit at which they ran, test files that are gone are dropped, and tables have every device."""
    (tmp_path / "nvidia-h200.json").write_text((SCRIPT.parent / "results" / "nvidia-h200.json").read_text())
    for module in (harness, tables):
        monkeypatch.setattr(module, "RESULTS", tmp_path)

    def run(device, commit, *files, cases=()):
        gpu = {"driver": "580", "cuda": "13.0"}
        monkeypatch.setattr(harness, "device_name", lambda: device)
        monkeypatch.setattr(harness, "commit", lambda: commit)
        monkeypatch.setattr(harness, "provenance", lambda: {"commit": commit, "versions": {"torch": "2.11.0"}, "gpu": gpu})
        monkeypatch.setattr(harness, "_records", {})
        if files:
            counts = {"passed": 3, "failed": 0, "skipped": 1, "not run": 2}
            harness.write_tests({f"tests/ops/test_{file}.py": counts for file in files})
        for case in cases:
            row = {"provider": "vlmkernels", "ms": 1.0, "ratio_to_ours": 1.0, "percent_of_copy": 50.0, "peak_mib": 2.0}
            harness.record(case, [row])

    before = tables.gpu_tests()
    assert "| tests/ops/test_group_attention.py | 163 | 0 | 202 | 0 | 02145dccf1b5 |" in before
    run("NVIDIA H100 80GB HBM3", "first", cases=["rotary text"])  # no test, and no case of HEADLINES
    assert "H100" not in "".join(tables.gpu() + tables.gpu_tests())
    assert "| rotary text | 1 | 50 % of copy |  | 2 |" in tables.gpu("all")

    run("NVIDIA H100 80GB HBM3", "second", "rotary", "sample_logps")
    run("NVIDIA H100 80GB HBM3", "third", "rotary")
    run("NVIDIA H200", "third", "tree_attention", cases=["tree_attention P 2048, 8 x 512, 16 heads of 128"])
    h100, h200 = "\n".join(tables.gpu_tests()).split("\n\n")
    assert h100.splitlines()[2:] == [
        "| tests/ops/test_rotary.py | 3 | 0 | 1 | 2 | third |",
        "| tests/ops/test_sample_logps.py | 3 | 0 | 1 | 2 | second |",
        "| all | 6 | 0 | 2 | 4 |  |",
    ]
    kept = [line for line in before[2:-1] if "group_attention" not in line]
    assert [line for line in h200.splitlines()[2:-1] if "tree_attention" not in line] == kept
    assert "| tests/ops/test_tree_attention.py | 3 | 0 | 1 | 2 | third |" in h200
    assert "attention, prefix of 2048, 8 completions of 512, with gradients | 1 | 50 % of copy |  | 2 |" in "\n".join(
        tables.gpu()
    )
    assert "02145dccf1b5, " in tables.gpu()[-1]
    assert ", third." in tables.gpu()[-1]


def test_ceilings_of_a_slow_machine(monkeypatch):
    """They are not rounded to 0: every rate is divided by them."""
    monkeypatch.setattr(harness, "time_calls", lambda run, calls=1: 1.0)
    assert harness.ceilings.__wrapped__()["gemm_tflop_s"] == 0.01718


def test_the_tables_name_what_exists(script):
    assert {*script.TESTS} - {"*"} <= {*script.test_files()}
    spec = importlib.util.spec_from_file_location("kernel_cases", SCRIPT.with_name("kernel_cases.py"))
    cases = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cases)
    assert {case for case, _, _ in script.PROFILES} <= cases.CASES.keys()
    assert {*script.SANITIZED} <= cases.CASES.keys()
    assert all((SCRIPT.parent / bench.file).exists() for rows in script.BENCHES.values() for bench in rows)
