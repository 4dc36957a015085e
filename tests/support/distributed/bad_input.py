"""Mistakes of one of two processes, or of both, and the errors with which both stop."""

import io
import os
import socket
import time

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, gather_object

from support import tiny
from support.distributed import processes
from support.engines import FunctionEngine
from vlmkernels.train import GRPOConfig, GRPOTrainer
from vlmkernels.train.processes import Processes


def is_second() -> bool:
    return os.environ.get("RANK") == "1"


def train(output_dir, *, model=None, data=None, reward=processes.length, fsdp=None, **options):
    AcceleratorState._reset_state(reset_partial_state=False)
    args = GRPOConfig(
        output_dir=str(output_dir), **{"per_device_train_batch_size": 4, "num_generations": 4, **options},
        max_completion_length=4, max_steps=1, use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
        **({"fsdp": True, "fsdp_config": {**processes.FSDP["fsdp_config"], **fsdp}} if fsdp is not None else {}),
    )  # fmt: skip
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU if fsdp is None else DistributedType.MULTI_GPU
    model = tiny.vlm(tied=False) if model is None else model
    data = tiny.rows(8, "one") if data is None else data
    trainer = GRPOTrainer(model, reward, args, data, processing_class=tiny.processor())
    trainer.engine = FunctionEngine(processes.completions_of)
    trainer.train()


def truncated_images() -> list[dict]:
    """Rows with images whose header can be read and whose pixels cannot."""
    file = io.BytesIO()
    tiny.image(3, width=280, height=280).save(file, "png")
    return [row | {"image": {"bytes": file.getvalue()[:200]}} for row in tiny.rows(8, "one")]


def failing(completions, **kwargs):
    if is_second():
        raise KeyError("no such answer")
    return processes.length(completions)


def fails_later():
    """A reward of the second process that fails in the second round of sampling, while the batch of the first is full."""
    calls = []

    def failing(completions, **kwargs):
        calls.append(len(completions))
        if is_second() and len(calls) > 1:
            raise KeyError("no such answer")
        return [0.0] * len(completions) if is_second() else processes.length(completions)

    return failing


def renamed(completions, **kwargs):
    return processes.length(completions)


def arrive_late(output_dir):
    processes = Processes(60)
    processes.barrier("the first step")
    processes.timeout = 0.4
    if is_second():
        time.sleep(1.2)
    processes.barrier("the second step")


def mixed_dtypes():
    model = tiny.vlm(tied=False)
    model.lm_head.bfloat16()
    return model


def without_weights():
    model = tiny.vlm(tied=False)
    model.lm_head.weight.data.fill_(float("nan"))
    return model


def both(**wrong):
    """A case in which both processes train with these arguments, each given by a function that creates it."""
    return lambda output_dir: train(output_dir, **{name: make() for name, make in wrong.items()})


def second(**wrong):
    """A case in which only the second process trains with these arguments."""
    return lambda output_dir: train(output_dir, **{name: make() for name, make in wrong.items()} if is_second() else {})


def differing(difference: str, number: int = 1, **wrong):
    """A case in which the second process is set up differently, and the errors of both."""
    own = f"ValueError: process 1 must be set up like process 0, got {number} differences: {difference}"
    return second(**wrong), f"RuntimeError: process 1 stopped at the comparison of processes: {own}", own


# For each case: the function that runs, and the beginnings of the errors of process 0 and process 1.
CASES = {
    "arguments": differing("argument: learning_rate is 0.03, not 1e-06", learning_rate=lambda: 3e-2),
    "rows": differing("train_dataset: rows is 9, not 8", number=2, data=lambda: tiny.rows(9, "one")),
    "prompts": differing("train_dataset: prompts is ", data=lambda: tiny.rows(9, "one")[1:]),
    "weights": differing("model: weights is ", model=lambda: tiny.vlm(1, tied=False)),
    "dtype": differing(
        "model: dtypes is torch.bfloat16, not torch.float32", number=2, model=lambda: tiny.vlm(tied=False).bfloat16()
    ),
    "rewards": differing("rewards: names is ['renamed'], not ['length']", reward=lambda: renamed),
    "a reward that fails": (
        both(reward=lambda: failing),
        "RuntimeError: process 1 stopped at the completions of step 0: RuntimeError: reward failing failed",
        "RuntimeError: reward failing failed",
    ),
    "a reward that fails while the other process waits": (
        both(reward=fails_later, dynamic_sampling=lambda: True),
        "RuntimeError: process 1 stopped at the completions of step 0: RuntimeError: reward failing failed",
        "RuntimeError: reward failing failed",
    ),
    "an image that cannot be read": (
        second(data=truncated_images),
        "RuntimeError: process 1 stopped at the completions of step 0: ValueError: train_dataset: sample ",
        "ValueError: train_dataset: sample ",
    ),
    "an image that cannot be read, under FSDP2": (
        lambda output_dir: train(output_dir, fsdp={}, **({"data": truncated_images()} if is_second() else {})),
        "RuntimeError: process 1 stopped at the completions of step 0: ValueError: train_dataset: sample ",
        "ValueError: train_dataset: sample ",
    ),
    "a missing model": (
        second(model=lambda: "/nowhere"),
        "RuntimeError: process 1 stopped at the set-up: ValueError: model must be an existing folder",
        "ValueError: model must be an existing folder",
    ),
    "weights that are NaN": (
        both(model=without_weights),
        "RolloutError: token 0 of completion 0 of prompt 0 cannot be sampled: its logits are NaN or infinite",
        "RuntimeError: process 0 stopped at the agreement of rollout and training: RolloutError: token 0 of completion 0",
    ),
    "a process that lags": (
        arrive_late,
        f"TimeoutError: waited 0.4 s before the second step for process 1 on {socket.gethostname()}, last seen at the first",
        "RuntimeError: process 0 waited 0.4 s before the second step for process 1",
    ),
    "groups that do not fit": (
        both(num_generations=lambda: 3), *["ValueError: num_generations must divide per_device_train_batch_size"] * 2
    ),
    "half precision": (
        both(model=lambda: tiny.vlm(tied=False).half()), *["ValueError: model must have trained parameters in float32 or"] * 2
    ),
    "weights on one process alone": (
        both(fsdp=lambda: {"cpu_ram_efficient_loading": True}), *["ValueError: cpu_ram_efficient_loading must be false"] * 2
    ),
    "two dtypes under FSDP2": (
        both(model=mixed_dtypes, fsdp=lambda: {}), *["ValueError: model must have trained parameters of one dtype"] * 2
    ),
}  # fmt: skip


def run(output_dir, name: str) -> list[str | None]:
    """The errors of both processes, None without one."""
    error = None
    try:
        CASES[name][0](output_dir)
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    return gather_object([error])
