"""Short training runs of the model of ``tool_models``, and the run that a test kills while a tool runs."""

import copy
import os
import random
import time
from pathlib import Path

import numpy as np
import torch
from transformers import TrainerCallback

from support.tool_models import Microscope, picture
from support.training import config
from vlmkernels.train import GRPOTrainer

torch.set_num_threads(1)
OPTIONS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_completion_length": 150}
GREEDY = {"top_k": 1, "learning_rate": 0.0}


class Seen:
    """A reward that keeps what it gets. The value of a trajectory is its place in the batch."""

    __name__ = "seen"

    def __init__(self):
        self.calls = []

    def __call__(self, completions, **kwargs):
        self.calls.append({"completions": completions, **kwargs})
        return [float(k) for k in range(len(completions))]


def build(folder, made, reward, rows=None, tools=None, callbacks=(), eval_dataset=None, peft_config=None, **options):
    args = config(folder, **{**OPTIONS, **options})
    return GRPOTrainer(
        copy.deepcopy(made.model),
        reward,
        args,
        made.rows if rows is None else rows,
        eval_dataset,
        made.processor,
        list(callbacks),
        peft_config=peft_config,
        **({"tools": [made.tool]} if tools is None else tools),
    )


def logs_of(trainer):
    return [log for log in trainer.state.log_history if "loss" in log]


def texts(messages):
    """The roles and texts of messages, with the sizes of images in place of pixels."""
    found = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        found.append((message["role"], [part["text"] if part["type"] == "text" else part["image"].size for part in parts]))
    return found


def per_turn(completions, **kwargs):
    """A reward per turn, different in each turn of each trajectory."""
    return [[k % 3 + 2.0 * t * t for t in range(sum(m["role"] == "assistant" for m in c))] for k, c in enumerate(completions)]


class Experiences(TrainerCallback):
    """Keeps what each step was trained on, and lets the tools hang from a step on."""

    def __init__(self, hang, step=None):
        self.hang, self.step, self.steps, self.trainer = hang, step, {}, None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.hang.touch()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps[state.global_step] = self.trainer._experience


def drawing(folder):
    """A tool and an environment whose results are random numbers. They hang while there is a file "hang"."""

    def draw(index):
        if (folder / "hang").exists():
            (folder / "running").write_text(str(os.getpid()))
            time.sleep(1000)
        numbers = [random.random(), np.random.random(), float(torch.rand(()))]  # noqa: NPY002
        return [f"crop {index}", picture(random.randrange(100)), *(f" {10 * x:.0f}" for x in numbers)]

    def zoom(index: int) -> list:
        """Return a part of the image.

        Args:
            index: which part.
        """
        return draw(index)

    class Drawing(Microscope):
        def reset(self, **row):
            self.calls = 0
            return random.choice(("saw ", "crop "))

        def zoom(self, index: int) -> list:
            """Return a part of the image.

            Args:
                index: which part.
            """
            self.calls += 1
            return draw(index)

    return {"tools": {"tools": [zoom]}, "environment": {"environment_factory": Drawing}}


def resumable(folder, made, how, hangs_at=None):
    """A run of three batches of two steps each, with a checkpoint after every step.

    Args:
        folder: of the output, in "tools" or "environment", and of the files "hang" and "running".
        made: the model.
        how: whether "tools" or an "environment" draw random numbers.
        hangs_at: the step from which on the tools hang.

    Returns:
        The trainer, its reward, and what its steps were trained on.
    """
    seen, experiences = Seen(), Experiences(folder / "hang", hangs_at)
    options = {"steps_per_generation": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 6, "learning_rate": 1e-3}
    options |= {"optim": "adamw_torch", "shuffle_dataset": True, "beta": 0.1, "tool_timeout": None}
    trainer = build(folder / how, made, seen, None, drawing(folder)[how], [experiences], **options)
    experiences.trainer = trainer
    return trainer, seen, experiences.steps


def hang(folder: str) -> None:
    """A run of the model in ``made.pt`` whose tools hang in the third batch."""
    output = Path(folder)
    resumable(output, torch.load(output / "made.pt", weights_only=False), "tools", hangs_at=4)[0].train()
