"""Processes forked from a server that has already imported everything: they start in hundredths of a second."""

import gc
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import torch

from support import paths

# What programs of tests import. Imported by the server, they cost each program nothing.
PRELOAD = ["support.faults.runs", "support.distributed.launched", "support.tool_runs", "support.trl_processes"]


def server():
    """The multiprocessing context whose server forks the processes. It is started once and imports ``PRELOAD``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    path = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = paths.environment()["PYTHONPATH"]
    multiprocessing.forkserver.ensure_running()
    os.environ["PYTHONPATH"] = path
    return context


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def _process(function, folder: str, rank: int, world: int, port: str, arguments: tuple) -> None:
    os.dup2(os.open(f"{folder}/output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    torch.set_num_threads(1)
    gc.freeze()  # every ``train`` collects garbage, which takes half a second with all these modules
    os.environ["OMP_NUM_THREADS"] = "1"  # otherwise accelerate sets its own number
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    function(folder, *arguments)
    sys.stdout.flush()
    os._exit(0)  # a gloo thread that needs the interpreter while it shuts down would abort the process


def start(context, function, folder, *arguments, world: int = 1) -> list:
    """Run ``function(folder, *arguments)`` in ``world`` processes, whose output goes to ``folder/output-<rank>``."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    port = free_port()
    every = [
        context.Process(target=_process, args=(function, str(folder), rank, world, port, arguments), daemon=True)
        for rank in range(world)
    ]
    for process in every:
        process.start()
    return every


def ended(processes, timeout: float) -> list[int]:
    """The exit codes. A process that is still running after ``timeout`` seconds is killed, and its code is None."""
    codes = []
    for process in processes:
        process.join(timeout)
        codes.append(process.exitcode)
        if process.exitcode is None:
            process.kill()
            process.join()
    return codes


def run(context, function, folder, *arguments, world: int = 1, timeout: float = 300) -> None:
    """Run ``function(folder, *arguments)`` in ``world`` processes to the end, which must be a success."""
    codes = ended(start(context, function, folder, *arguments, world=world), timeout)
    assert codes == [0] * world, "\n".join(Path(folder, f"output-{rank}").read_text()[-3000:] for rank in range(world))
