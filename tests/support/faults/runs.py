"""Small training runs, and the faults that are injected into them."""

import io
import itertools
import json
import os
import resource
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from support import tiny
from vlmkernels.train import GRPOConfig, GRPOTrainer
from vlmkernels.train.checkpoint import last_complete_checkpoint

torch.set_num_threads(1)
SHORT = {"max_steps": 5, "save_steps": 2}


def brevity(completions, **kwargs):
    return [1 / (1 + len(c[0]["content"])) for c in completions]


def build(output_dir, data=None, rewards=("cer", brevity), eval_data=None, peft_config=None, **options) -> GRPOTrainer:
    """By default 9 steps in 2 epochs of 6, with a generation batch for every 4 steps and a checkpoint every 3."""
    AcceleratorState._reset_state(reset_partial_state=False)
    defaults = {
        "per_device_train_batch_size": 4, "num_generations": 4, "steps_per_generation": 2, "num_iterations": 2,
        "max_completion_length": 6, "beta": 0.1, "rollout_correction": "token_truncate", "learning_rate": 1e-2, "max_steps": 9,
        "save_steps": 3, "logging_steps": 1, "disable_tqdm": True, "report_to": "none", "use_cpu": True, "bf16": False,
    }  # fmt: skip
    args = GRPOConfig(output_dir=str(output_dir), **{**defaults, **options})
    data = tiny.rows(3 * args.world_size, "mixed") if data is None else data
    model, processor = tiny.vlm(), tiny.processor()
    return GRPOTrainer(model, list(rewards), args, data, eval_data, processing_class=processor, peft_config=peft_config)


def losses(trainer) -> dict[int, dict]:
    """The log of each step, without times."""
    return {
        log["step"]: {name: value for name, value in log.items() if "time" not in name and "per_second" not in name}
        for log in trainer.state.log_history
        if "loss" in log
    }


def train(folder, options: dict) -> None:
    """Train to the end, from the last checkpoint if there is one, and write the logs to ``losses-<rank>.json``."""
    trainer = build(folder, **options)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    Path(folder, f"losses-{trainer.args.process_index}.json").write_text(json.dumps(losses(trainer)))


# Faults


@contextmanager
def file_events(folder, on_event):
    """Within the context, ``on_event(what)`` runs before Python changes a file in ``folder``, and when torch or safetensors
    has written half of a file there."""
    import transformers.modeling_utils as modeling

    active = [True]

    def audit(event, arguments):
        if not active[0] or not arguments or not isinstance(arguments[0], (str, os.PathLike)):
            return
        path = str(arguments[0])
        writes = event != "open" or (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir") and writes and path.startswith(str(folder)):
            on_event(f"{event} {path}")

    def halved(write):
        def written(what, path, *arguments, **options):
            write(what, path, *arguments, **options)
            if str(path).startswith(str(folder)) and active[0]:
                size = os.path.getsize(path)
                whole = Path(path).read_bytes()
                os.truncate(path, size // 2)
                on_event(f"half of {path}")
                active[0] = False
                Path(path).write_bytes(whole)
                active[0] = True

        return written

    sys.addaudithook(audit)
    saves = torch.save, modeling.safe_save_file
    torch.save, modeling.safe_save_file = halved(saves[0]), halved(saves[1])
    try:
        yield
    finally:
        active[0] = False
        torch.save, modeling.safe_save_file = saves


def save_and_die(save, folder, event: int) -> None:
    """``save()``, killed by SIGKILL at this file event if there are so many."""
    events = itertools.count()

    def on_event(what):
        if next(events) == event:
            os.kill(os.getpid(), signal.SIGKILL)

    with file_events(folder, on_event):
        save()


def seen_at_every_file(folder) -> None:
    """Save the checkpoint of step 6 twice, with save_total_limit=1, in a run that already has the checkpoint of step 3.

    ``<folder>/<save>-<event>`` is a copy of the run's folder at each file event: what a process that is killed there leaves.
    The events are in events.json.
    """
    trainer, events = build(f"{folder}/run", save_total_limit=1), []
    save = trainer._save_checkpoint

    def watched(model, trial):
        if trainer.state.global_step != 6:
            return save(model, trial)
        for number in (1, 2):
            names = []

            def on_event(what, number=number, names=names):
                shutil.copytree(f"{folder}/run", f"{folder}/{number}-{len(names)}")
                names.append(what)

            with file_events(f"{folder}/run", on_event):
                save(model, trial)
            events.append(names)
        Path(folder, "events.json").write_text(json.dumps(events))
        os._exit(0)

    trainer._save_checkpoint = watched
    trainer.train()


def die_in_step(trainer, rank: int, step: int) -> None:
    """One process is killed in the middle of a step."""
    compute_loss = trainer.compute_loss

    def loss_or_die(*arguments, **options):
        if trainer.args.process_index == rank and trainer.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return compute_loss(*arguments, **options)

    trainer.compute_loss = loss_or_die


def train_and_die(folder, rank: int, step: int, options: dict) -> None:
    trainer = build(folder, **options)
    die_in_step(trainer, rank, step)
    trainer.train()


def limit_files(trainer, size: int, rank: int = 0, steps=(6,)) -> None:
    """At these steps one process cannot write files of more than ``size`` bytes, as on a full disk."""
    save = trainer._save_checkpoint

    def save_within(model, trial):
        if trainer.state.global_step in steps and trainer.args.process_index == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        try:
            save(model, trial)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    trainer._save_checkpoint = save_within


def spoil_loss(trainer, steps, rank: int = 0, always: bool = False) -> None:
    """The losses of one process are NaN at these steps (from 0): the first time a step runs, or always."""
    of_parts, left = trainer.objective.split_loss, set(steps)

    def spoilt(*arguments):
        loss, metrics, *more = of_parts(*arguments)
        step = trainer.state.global_step
        if step in left and trainer.args.process_index == rank:
            left.discard(None if always else step)
            loss, metrics = loss * float("nan"), metrics | {"kl": metrics["kl"] * float("nan")}
        return loss, metrics, *more

    trainer.objective.split_loss = spoilt


def spoil_gradient(trainer, steps, name: str) -> None:
    """The gradient of one parameter is infinite at these steps (from 0)."""
    parameter = dict(trainer.model.named_parameters())[name]
    parameter.register_hook(lambda g: g * float("inf") if trainer.state.global_step in steps else g)


def corrupt(row: dict) -> dict:
    """The row with half of an image file, whose header is complete."""
    buffer = io.BytesIO()
    tiny.image(5, width=112, height=112).save(buffer, "PNG")
    others = {name: value for name, value in row.items() if name != "image"}
    return {**others, "images": [buffer.getvalue()[: len(buffer.getvalue()) // 2]]}


def what_two_do(folder) -> None:
    """Faults of one process among several. Each process writes its logs and errors to ``said-<rank>.json``."""
    said = {}

    def attempt(name: str, change=None, **options):
        resume = options.pop("resume", None)
        trainer = build(f"{folder}/{name}", **{**SHORT, **options})
        if change is not None:
            change(trainer)
        try:
            trainer.train(resume_from_checkpoint=resume)
            said[name] = {"losses": losses(trainer)}
        except Exception as error:
            said[name] = {"error": f"{type(error).__name__}: {error}"}

    rank = int(os.environ["RANK"])
    attempt("whole")
    attempt("disk", lambda t: limit_files(t, 1000, rank=1, steps=[4]), on_save_error="skip")
    attempt("disk raises", lambda t: limit_files(t, 1000, rank=1, steps=[4]))
    attempt("loss", lambda t: spoil_loss(t, [1], rank=1))
    attempt("loss skipped", lambda t: spoil_loss(t, [1], rank=1), on_nonfinite="skip", max_steps=2)
    bad = [corrupt(row) if index == 2 else row for index, row in enumerate(tiny.rows(6, "one"))]
    attempt("image", data=bad, on_bad_sample="skip", max_steps=1)
    attempt("image raises", data=bad)
    if rank == 0:
        path = Path(folder, "whole", "checkpoint-4", "vlmkernels.json")
        path.write_text(path.read_text().replace('"format": 2', '"format": 3'))
    torch.distributed.barrier()
    attempt("newer", resume=f"{folder}/whole/checkpoint-4")
    Path(folder, f"said-{rank}.json").write_text(json.dumps(said))
