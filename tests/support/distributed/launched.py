"""The program that tests run with several processes: the named cases of three modules in order."""

import gc
import json
import os
import sys
from pathlib import Path

import torch

from support.distributed import bad_input, dynamic, processes


def run(folder: str, names: list[str], configured: dict[str, str] | None = None) -> None:
    """configured: the environment variables that `accelerate launch` would have set."""
    processes.CONFIGURED.update(configured or {})
    modules = {name: module for module in (processes, bad_input, dynamic) for name in module.CASES}
    results = {name: modules[name].run(folder, name) for name in names}
    if os.environ["RANK"] == "0":
        Path(folder, "results.json").write_text(json.dumps(results))
    torch.distributed.barrier()


if __name__ == "__main__":
    gc.freeze()  # every ``train`` collects garbage, which takes half a second with all these modules
    run(sys.argv[1], sys.argv[2:])
    os._exit(0)  # a gloo thread that needs the interpreter while it shuts down would abort the process
