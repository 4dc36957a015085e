"""The same two steps and evaluation by however many processes run it: the subprocess of a test."""

import json
import os
import sys
from pathlib import Path

import tiny
import torch

from vlmkernels.train import GRPOConfig, GRPOTrainer
from vlmkernels.train.rollout import Rollout

torch.set_num_threads(1)


def length(completions, **kwargs):
    return [float(len(c[0]["content"])) for c in completions]


def completions_of(model, prompts, num_generations, temperature):
    """In place of sampling: completions that depend on the prompt alone."""
    group = torch.arange(len(prompts.num_images)).repeat_interleave(num_generations)
    sums = (prompts.inputs["input_ids"] * prompts.inputs["attention_mask"]).sum(1) % 7
    member = torch.arange(num_generations).repeat(len(sums))
    ids = (sums[group, None] + 3 * member[:, None] + torch.arange(4)) % 30
    lengths = 1 + (sums[group] + member) % 4
    return Rollout(prompts, group, ids, torch.arange(4) < lengths[:, None], lengths < 3)


def run(output_dir) -> list[dict]:
    args = GRPOConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", "1")),
        num_generations=4,
        gradient_accumulation_steps=2,
        max_completion_length=4,
        beta=0.1,
        max_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        optim="sgd",
        max_grad_norm=0.0,
        num_generations_eval=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    data = tiny.rows(8, "mixed")
    trainer = GRPOTrainer(tiny.vlm(tied=False), length, args, data, data[:5], processing_class=tiny.processor())
    trainer.generate = completions_of
    trainer.train()
    return trainer.state.log_history[:-1]


if __name__ == "__main__":
    logs = run(sys.argv[1])
    if os.environ["RANK"] == "0":
        Path(sys.argv[1], "logs.json").write_text(json.dumps(logs))
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads may ask for the interpreter while it ends, which aborts the process
