"""Runs with and without this package by as many processes as there are: the subprocess of a test."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import trl
from trl_runs import build, rows, tiny_model, train

from vlmkernels.integrations.trl import patch_trl

torch.set_num_threads(1)
CASES = {
    "token": {"loss_type": "dapo", "beta": 0.1, "top_entropy_quantile": 0.7, "entropy_coef": 0.01},
    "sequence": {"loss_type": "grpo", "importance_sampling_level": "sequence", "num_iterations": 3},
}


def logs(path: Path, options: dict) -> list[dict]:
    steps = {"max_steps": 3, "per_device_train_batch_size": 4}
    return train(build(path, trl.GRPOTrainer, *tiny_model("qwen2_5_vl"), rows(4, [[(28, 28)]]), **steps | options)).logs


if __name__ == "__main__":
    folder, results = Path(sys.argv[1]), []
    for options in CASES.values():
        own = folder / os.environ["RANK"]
        theirs = logs(own, options)
        with patch_trl():
            results.append((theirs, logs(own, options)))
    if os.environ["RANK"] == "0":
        (folder / "logs.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads may ask for the interpreter while it ends, which aborts the process
