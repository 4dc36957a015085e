"""Launches several processes once for all tests that need that number of them."""

import json
import subprocess
import sys

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from support import forks
from support.distributed import bad_input, dynamic, processes
from support.distributed import launched as program
from support.paths import ROOT, environment


def flags(config: str, number: int) -> list[str]:
    """The flags of `accelerate launch`."""
    of_processes = ["--num_processes", str(number), "--mixed_precision", "no", "--main_process_port", "0"]
    return ["--config_file", str(ROOT / "configs" / config), *of_processes, "--module"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where the cases write. Three processes resume from a checkpoint that two have saved."""
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="session")
def launch(folder):
    """A function that runs cases with ``number`` processes under ``configs/<config>`` and returns the results by name."""

    def launch(config: str, number: int, names: list[str]) -> dict:
        accelerate = [sys.executable, "-m", "accelerate.commands.launch", *flags(config, number)]
        command = [*accelerate, "support.distributed.launched", str(folder), *names]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads((folder / "results.json").read_text())

    return launch


@pytest.fixture(scope="session")
def fork(server, folder):
    """``launch`` without the launcher, whose processes would have to import everything."""

    def fork(config: str, number: int, names: list[str]) -> dict:
        arguments, *_ = _validate_launch_command(launch_command_parser().parse_args([*flags(config, number), "program"]))
        environment = prepare_multi_gpu_env(arguments)
        configured = {name: value for name, value in environment.items() if name.startswith(("ACCELERATE_", "FSDP_"))}
        forks.run(server, program.run, folder, names, configured, world=number, timeout=600)
        return json.loads((folder / "results.json").read_text())

    return fork


@pytest.fixture(scope="session")
def launched(launch, fork):
    """The results of the cases without DeepSpeed, by the number of processes."""
    names = {**processes.LAUNCHES, 2: [*processes.LAUNCHES[2], *dynamic.CASES, *bad_input.CASES]}
    return {2: launch("fsdp2.yaml", 2, names[2]), 3: fork("ddp.yaml", 3, names[3])}


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
