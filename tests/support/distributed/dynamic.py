"""Runs with dynamic sampling in one process or several: random completions, and rows whose rewards are all equal."""

import os
from itertools import zip_longest
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, gather_object

from support import tiny
from support.distributed.processes import FSDP, whole_parameters
from support.engines import FunctionEngine
from support.training import config
from vlmkernels.rollout.base import Rollout
from vlmkernels.train import GRPOTrainer

NUM_ROWS = 14
EQUAL = (0, 1, 2, 8, 11)  # the rows whose completions all have reward 0
WRAPPED = {"fsdp": True, "fsdp_config": {**FSDP["fsdp_config"], "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"]}}
# Two optimizer steps per generation batch of four groups, and a checkpoint after each.
OPTIONS = {
    "num_iterations": 2, "gradient_accumulation_steps": 2, "max_steps": 5, "learning_rate": 1e-3, "optim": "adamw_torch",
    "save_strategy": "steps", "save_steps": 1, "dynamic_sampling": True, "shuffle_dataset": True, "use_cpu": True,
}  # fmt: skip
CASES = {"ddp, dynamic sampling": {}, "fsdp, dynamic sampling": {**WRAPPED, "max_steps": 1, "save_strategy": "no"}}
RESUMED = {"checkpoint-2": 2, "checkpoint-3": 3}  # after a batch, and within one


def completions_of(model, prompts, num_generations, temperature):
    group = torch.arange(len(prompts)).repeat_interleave(num_generations)
    lengths = torch.randint(1, 5, (len(group),))
    ids = torch.randint(30, (len(group), 4))
    return Rollout(prompts, group, ids, torch.arange(4) < lengths[:, None], lengths < 3)


def data():
    return [{**row, "level": float(index not in EQUAL)} for index, row in enumerate(tiny.rows(NUM_ROWS, "none"))]


class Calls:
    """A reward that keeps, for each call, the optimizer step, the rows and the tokens."""

    __name__ = "calls"

    def __init__(self):
        self.calls = []

    def __call__(self, completions, completion_ids, answer, level, trainer_state, **kwargs):
        self.calls.append([trainer_state.global_step, list(map(int, answer[::4])), completion_ids])
        return [scale * ids[0] for scale, ids in zip(level, completion_ids, strict=True)]


def rows_of(calls, step):
    """The rows that all processes sampled at a step, in the order of the stream, from the calls of each process."""
    queues = [[rows for at, rows, _ in of_process if at == step] for of_process in calls]
    return [row for rounds in zip_longest(*queues, fillvalue=[]) for rows in rounds for row in rows]


def build(folder, reward=None, rows=None, model=None, **options):
    """A trainer and its reward."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        AcceleratorState._reset_state(reset_partial_state=False)
    args = config(folder, **{"per_device_train_batch_size": 8, **OPTIONS, **options})
    if processes > 1:
        PartialState._shared_state["distributed_type"] = (
            DistributedType.MULTI_GPU if "fsdp" in options else DistributedType.MULTI_CPU
        )
    reward, processor = Calls() if reward is None else reward, tiny.tokenizer() if model is None else tiny.processor()
    model, rows = tiny.text_model() if model is None else model, data() if rows is None else rows
    trainer = GRPOTrainer(model, reward, args, rows, processing_class=processor)
    trainer.engine = FunctionEngine(completions_of)
    return trainer, reward


def run(folder, name: str = "ddp, dynamic sampling") -> dict:
    """The calls of each process and the logs of a run, and of its continuations; whether they end with the same parameters."""
    folder, options = Path(folder, name), CASES[name]
    trainer, reward = build(folder, **options)
    trainer.train()
    parameters = whole_parameters(trainer)
    result = {"calls": gather_object([reward.calls]), "logs": trainer.state.log_history[:-1], "resumed": {}}
    for checkpoint in RESUMED if "fsdp" not in options else ():
        resumed, again = build(folder / "resumed", save_strategy="no")
        resumed.train(resume_from_checkpoint=str(folder / checkpoint))
        same = all(torch.equal(x, parameters[key]) for key, x in whole_parameters(resumed).items())
        position = resumed._batch_sampler.stream.position == trainer._batch_sampler.stream.position
        result["resumed"][checkpoint] = {"calls": gather_object([again.calls]), "same": gather_object([same and position])}
    return result
