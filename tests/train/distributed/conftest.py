"""Launches several processes once for all tests that need that number of them."""

import json
import subprocess
import sys

import pytest
from support.distributed import bad_input, dynamic, processes
from support.paths import ROOT, environment


@pytest.fixture(scope="session")
def launch(tmp_path_factory):
    """A function that runs cases with ``number`` processes under ``configs/<config>`` and returns the results by name."""
    folder = tmp_path_factory.mktemp("processes")

    def launch(config: str, number: int, names: list[str]) -> dict:
        accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs" / config)]
        flags = ["--num_processes", str(number), "--mixed_precision", "no", "--main_process_port", "0"]
        command = [*accelerate, *flags, "--module", "support.distributed.launched", str(folder), *names]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads((folder / "results.json").read_text())

    return launch


@pytest.fixture(scope="session")
def launched(launch):
    """The results of the cases without DeepSpeed, by the number of processes."""
    names = {**processes.LAUNCHES, 2: [*processes.LAUNCHES[2], *dynamic.CASES, *bad_input.CASES]}
    return {2: launch("fsdp2.yaml", 2, names[2]), 3: launch("ddp.yaml", 3, names[3])}


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """A function that returns the results of a case in one process. Cases that differ only in sharding share one run."""
    results = {}

    def alone(name: str) -> dict:
        options = processes.options_alone(name)
        if (key := repr(sorted(options.items()))) not in results:
            results[key] = processes.run(tmp_path_factory.mktemp("one"), name)
        return results[key]

    return alone
