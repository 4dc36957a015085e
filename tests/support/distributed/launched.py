"""The program that tests launch with several processes: runs the named cases of three modules in order."""

import json
import os
import sys
from pathlib import Path

import torch

from support.distributed import bad_input, dynamic, processes

folder, *names = sys.argv[1:]
modules = {name: module for module in (processes, bad_input, dynamic) for name in module.CASES}
results = {name: modules[name].run(folder, name) for name in names}
if os.environ["RANK"] == "0":
    Path(folder, "results.json").write_text(json.dumps(results))
torch.distributed.barrier()
os._exit(0)  # a gloo thread that needs the interpreter while it shuts down would abort the process
