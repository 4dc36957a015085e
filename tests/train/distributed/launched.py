"""What tests launch several times at once: cases of ``processes`` and of ``bad_input``, one after the other."""

import json
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
import bad_input
import processes
import torch

folder, *names = sys.argv[1:]
results = {name: (bad_input if name in bad_input.CASES else processes).run(folder, name) for name in names}
if os.environ["RANK"] == "0":
    Path(folder, "results.json").write_text(json.dumps(results))
torch.distributed.barrier()
os._exit(0)  # gloo's threads may ask for the interpreter while it ends, which aborts the process
