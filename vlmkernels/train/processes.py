"""Barriers at which every process reports which process failed, differs or is late.

A collective that one process never calls blocks the others until a timeout that names no process. Therefore processes pass a
barrier before their collectives, through the key-value store that ``torch.distributed`` uses. If a process raises, the others
stop with its error. If a process does not arrive in time, the others name it and the barrier it passed last.
"""

import hashlib
import itertools
import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import accelerate
import torch
import transformers
from torch import distributed
from transformers import PreTrainedTokenizerBase, TrainingArguments

from vlmkernels.data.dataset import undecoded
from vlmkernels.data.images import IMAGE_ERRORS
from vlmkernels.rewards import Rewards
from vlmkernels.version import __version__

_instances = itertools.count()  # numbers the instances of Processes, alike on all processes

# Arguments that may differ between processes or machines.
_LOCAL_ARGUMENTS = {"local_rank", "output_dir", "logging_dir", "run_name"}
_COMPARED_ROWS = 64  # of the dataset


class Processes:
    """The barriers of a run's processes. With a single process they do nothing.

    Args:
        timeout: seconds that a barrier waits for the other processes.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout, self.rank, self.world_size = timeout, 0, 1
        self.waiting: Callable[[], AbstractContextManager] = nullcontext  # around every wait; the trainer times it
        self._store, self._barriers, number = None, 0, next(_instances)
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            from torch.distributed.distributed_c10d import _get_default_store

            self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
            self._store = distributed.PrefixStore(f"vlmkernels/{number}", _get_default_store())

    def barrier(self, at: str) -> None:
        """Wait until all processes have arrived.

        Args:
            at: name of the barrier, for error messages.

        Raises:
            RuntimeError: a process failed; the message has its error.
            TimeoutError: processes did not arrive within ``timeout`` seconds; the message names them.
        """
        if self._store is None:
            return
        number, self._barriers = self._barriers, self._barriers + 1
        self._report_arrival(at)
        if self._store.add(f"{number}/count", 1) == self.world_size:
            self._store.set(f"{number}/over", "")
            for key in ("count", "over", "error"):  # of the barrier before, which all processes have left
                self._store.delete_key(f"{number - 1}/{key}")
        start = time.monotonic()
        try:
            with self.waiting():
                self._store.wait([f"{number}/over"], timedelta(seconds=self.timeout))
        except distributed.DistStoreError as error:
            if time.monotonic() - start < self.timeout:  # the store was lost
                raise
            reason = f"waited {self.timeout:g} s before {at} for {', '.join(self._late(number))}"
            self._store.set(f"{number}/error", f"process {self.rank} {reason}")  # for processes that arrive later
            raise TimeoutError(reason) from error
        if self._store.check([f"{number}/error"]):
            raise RuntimeError(self._store.get(f"{number}/error").decode())

    @contextmanager
    def stop_together(self, at: str) -> Iterator[None]:
        """If one process raises inside, the others raise its error at their next barrier, which is at the end or inside."""
        if self._store is None:
            yield
            return
        self._report_arrival(at)
        try:
            yield
        except Exception as error:
            self._store.set(f"{self._barriers}/error", f"process {self.rank} stopped at {at}: {type(error).__name__}: {error}")
            self._store.set(f"{self._barriers}/over", "")
            raise
        self.barrier(f"the end of {at}")

    def compare(self, **described: dict[str, object]) -> None:
        """Raise ValueError on a process whose description differs from that of process 0, and RuntimeError on the others.

        Args:
            described: values by section and name, which are compared as text.
        """
        if self._store is None:
            return
        here = {f"{name}: {key}": str(value) for name, values in described.items() for key, value in values.items()}
        with self.stop_together("the comparison of processes"):
            if self.rank == 0:
                self._store.set("described", json.dumps(here))
            self.barrier("the comparison of processes")
            there = json.loads(self._store.get("described"))
            differing = [key for key in there | here if there.get(key) != here.get(key)]
            if differing:
                shown = "; ".join(f"{key} is {here.get(key)}, not {there.get(key)}" for key in differing[:8])
                raise ValueError(
                    f"process {self.rank} must be set up like process 0, got {len(differing)} differences: {shown}"
                )

    def _report_arrival(self, at: str) -> None:
        state = {"barriers": self._barriers, "at": at, "host": socket.gethostname()}
        self._store.set(f"seen/{self.rank}", json.dumps(state))

    def _late(self, number: int) -> Iterator[str]:
        """Describe the processes that have not arrived at barrier ``number``."""
        for rank in range(self.world_size):
            if not self._store.check([f"seen/{rank}"]):
                yield f"process {rank}, never seen"
                continue
            state = json.loads(self._store.get(f"seen/{rank}"))
            if state["barriers"] <= number:
                yield f"process {rank} on {state['host']}, last seen at {state['at']}"


def _digest(values: Iterable[object]) -> str:
    content = hashlib.blake2b(digest_size=8)
    for value in values:
        content.update(repr(value).encode())
    return content.hexdigest()


def _plain(value: object) -> object:
    """Replace images and other objects by their types. Their ``repr`` can hold an address, which no other process has."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (str, bytes, bool, int, float)) else type(value).__name__


def digest_rows(dataset: Any) -> str:
    """Return a hash of the prompts, without images, of at most ``_COMPARED_ROWS`` * 2 rows, spread over the dataset."""
    stored, rows = undecoded(dataset), range(0, len(dataset), max(1, len(dataset) // _COMPARED_ROWS))

    def prompt(index: int) -> object:
        try:
            row = stored[index]
        except IMAGE_ERRORS:  # a dataset that reads its images itself; on_bad_sample says what happens to the row
            return None
        return _plain(row.get("prompt")) if isinstance(row, dict) else None

    return _digest(map(prompt, rows))


def describe_process(
    args: TrainingArguments,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rewards: Rewards,
    dataset: Any,
    teacher: torch.nn.Module | None = None,
) -> dict[str, dict[str, object]]:
    """Return what must be alike on all processes, for ``Processes.compare``. Weights and prompts are hashed in part."""
    return {
        "versions": {"vlmkernels": __version__, **{lib.__name__: lib.__version__ for lib in (torch, transformers, accelerate)}},
        "argument": {name: value for name, value in args.to_dict().items() if name not in _LOCAL_ARGUMENTS},
        "model": _describe_model(model),
        "teacher": {} if teacher is None else _describe_model(teacher),
        "tokenizer": {"size": len(tokenizer), "chat template": _digest([tokenizer.chat_template])},
        "rewards": {"names": rewards.names, "weights": rewards.weights.tolist()},
        "train_dataset": {
            "rows": None if dataset is None else len(dataset),
            "prompts": None if dataset is None else digest_rows(dataset),
        },
    }


def _describe_model(model: torch.nn.Module) -> dict[str, object]:
    parameters = dict(model.named_parameters())
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in parameters.items()}
    # Parameters that ZeRO-3 sharded differ between processes.
    samples = (p.detach().flatten()[:8].tolist() for p in parameters.values() if not hasattr(p, "ds_id"))
    return {
        "class": type(model).__name__,
        "parameters": sum(shape.numel() for shape in shapes.values()),
        "dtypes": ", ".join(sorted({str(p.dtype) for p in parameters.values()})),
        "trained": sum(shapes[name].numel() for name, p in parameters.items() if p.requires_grad),
        "names and shapes": _digest((name, tuple(shape)) for name, shape in shapes.items()),
        "weights": _digest(samples),
    }
