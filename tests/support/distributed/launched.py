"""The program that tests launch with several processes: runs the named cases of ``processes`` and ``bad_input`` in order."""

import json
import os
import sys
from pathlib import Path

import torch

from support.distributed import bad_input, processes

folder, *names = sys.argv[1:]
results = {name: (bad_input if name in bad_input.CASES else processes).run(folder, name) for name in names}
if os.environ["RANK"] == "0":
    Path(folder, "results.json").write_text(json.dumps(results))
torch.distributed.barrier()
os._exit(0)  # a gloo thread that needs the interpreter while it shuts down would abort the process
