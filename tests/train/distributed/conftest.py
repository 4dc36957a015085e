"""Several processes, launched once for all tests that want their number."""

import json
import subprocess
import sys
from pathlib import Path

import bad_input
import processes
import pytest

SCRIPT = str(Path(__file__).with_name("launched.py"))
CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture(scope="session")
def launch(tmp_path_factory):
    """The results of some cases, by name, of a number of processes launched with a configuration."""
    folder = tmp_path_factory.mktemp("processes")

    def launch(config: str, number: int, names: list[str]) -> dict:
        accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)]
        flags = ["--num_processes", str(number), "--mixed_precision", "no", "--main_process_port", "0"]
        command = [*accelerate, *flags, SCRIPT, str(folder), *names]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads((folder / "results.json").read_text())

    return launch


@pytest.fixture(scope="session")
def launched(launch):
    """The results of the cases without DeepSpeed, by the number of processes."""
    names = {**processes.LAUNCHES, 2: [*processes.LAUNCHES[2], *bad_input.CASES]}
    return {2: launch("fsdp2.yaml", 2, names[2]), 3: launch("ddp.yaml", 3, names[3])}


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """What one process makes of a case; cases that differ in their sharding alone share it."""
    results = {}

    def alone(name: str) -> dict:
        options = processes.options_alone(name)
        if (key := repr(sorted(options.items()))) not in results:
            results[key] = processes.run(tmp_path_factory.mktemp("one"), name)
        return results[key]

    return alone
