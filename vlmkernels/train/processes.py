"""Points that all processes of a run reach together, or stop at for one reason: an error, a difference, a process that lags.

A collective that some process never calls keeps the others waiting, and its time-out names none of them. So the processes meet
before their collectives, through the key-value store that ``torch.distributed`` set itself up with: whoever fails says so, and
the others stop with that error; whoever does not come is named, with what it was last seen at.
"""

import hashlib
import itertools
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import accelerate
import torch
import transformers
from torch import distributed

from vlmkernels.version import __version__

_numbers = itertools.count()  # of Processes made so far, the same on all processes

# Arguments that may differ between processes, or from node to node.
_LOCAL_ARGUMENTS = {"local_rank", "output_dir", "logging_dir", "run_name"}
_COMPARED_ROWS = 64


class Processes:
    """This process among those of its run. Alone, it meets nobody and nothing here does anything.

    Args:
        timeout: seconds to wait for one another.

    ``waiting`` makes the context that a process waits in.
    """

    def __init__(self, timeout: float):
        self.timeout, self.rank, self.world_size, self.waiting = timeout, 0, 1, nullcontext
        self._store, self._meetings, number = None, 0, next(_numbers)
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            from torch.distributed.distributed_c10d import _get_default_store

            self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
            self._store = distributed.PrefixStore(f"vlmkernels/{number}", _get_default_store())

    def meet(self, at: str) -> None:
        """Wait for all processes; raise on each of them if one failed or does not come.

        Args:
            at: what they are about to do, or have done.

        Raises:
            RuntimeError: a process failed, with its error.
            TimeoutError: processes did not come within ``timeout`` seconds, each of which is named.
        """
        if self._store is None:
            return
        number, self._meetings = self._meetings, self._meetings + 1
        self._seen(at)
        if self._store.add(f"{number}/count", 1) == self.world_size:
            self._store.set(f"{number}/over", "")
            for key in ("count", "over", "error"):  # of the meeting before, which all have left
                self._store.delete_key(f"{number - 1}/{key}")
        start = time.monotonic()
        try:
            with self.waiting():
                self._store.wait([f"{number}/over"], timedelta(seconds=self.timeout))
        except distributed.DistStoreError as error:
            if time.monotonic() - start < self.timeout:  # the store is gone
                raise
            reason = f"waited {self.timeout:g} s before {at} for {', '.join(self._late(number))}"
            self._store.set(f"{number}/error", f"process {self.rank} {reason}")  # for those that come after all
            raise TimeoutError(reason) from error
        if self._store.check([f"{number}/error"]):
            raise RuntimeError(self._store.get(f"{number}/error").decode())

    @contextmanager
    def together(self, at: str) -> Iterator[None]:
        """An error inside, on one process, stops the others where they meet next: inside, or at the end."""
        if self._store is None:
            yield
            return
        self._seen(at)
        try:
            yield
        except Exception as error:
            self._store.set(f"{self._meetings}/error", f"process {self.rank} stopped at {at}: {type(error).__name__}: {error}")
            self._store.set(f"{self._meetings}/over", "")
            raise
        self.meet(f"the end of {at}")

    def compare(self, **described: dict[str, object]) -> None:
        """Stop all processes if one describes itself otherwise than process 0; ``described`` is compared as text."""
        if self._store is None:
            return
        here = {f"{name}: {key}": str(value) for name, values in described.items() for key, value in values.items()}
        with self.together("the comparison of processes"):
            if self.rank == 0:
                self._store.set("described", json.dumps(here))
            self.meet("the comparison of processes")
            there = json.loads(self._store.get("described"))
            differing = [key for key in there | here if there.get(key) != here.get(key)]
            if differing:
                shown = "; ".join(f"{key} is {here.get(key)}, not {there.get(key)}" for key in differing[:8])
                raise ValueError(
                    f"process {self.rank} must be set up as process 0 is, got {len(differing)} differences: {shown}"
                )

    def _seen(self, at: str) -> None:
        state = {"meetings": self._meetings, "at": at, "host": socket.gethostname()}
        self._store.set(f"seen/{self.rank}", json.dumps(state))

    def _late(self, number: int) -> Iterator[str]:
        for rank in range(self.world_size):
            if not self._store.check([f"seen/{rank}"]):
                yield f"process {rank}, never seen"
                continue
            state = json.loads(self._store.get(f"seen/{rank}"))
            if state["meetings"] <= number:
                yield f"process {rank} on {state['host']}, last seen at {state['at']}"


def _digest(values: Iterator[object]) -> str:
    content = hashlib.blake2b(digest_size=8)
    for value in values:
        content.update(repr(value).encode())
    return content.hexdigest()


def described(args, model: torch.nn.Module, tokenizer, rewards, dataset) -> dict[str, dict[str, object]]:
    """What must be alike on all processes, for ``Processes.compare``; of weights and prompts some, as a digest."""
    parameters = dict(model.named_parameters())
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in parameters.items()}
    first = (p.detach().flatten()[:8].tolist() for p in parameters.values() if not hasattr(p, "ds_id"))  # the others are cut
    rows = [] if dataset is None else range(0, len(dataset), max(1, len(dataset) // _COMPARED_ROWS))
    return {
        "versions": {"vlmkernels": __version__, **{lib.__name__: lib.__version__ for lib in (torch, transformers, accelerate)}},
        "argument": {name: value for name, value in args.to_dict().items() if name not in _LOCAL_ARGUMENTS},
        "model": {
            "class": type(model).__name__,
            "parameters": sum(shape.numel() for shape in shapes.values()),
            "dtypes": ", ".join(sorted({str(p.dtype) for p in parameters.values()})),
            "trained": sum(shapes[name].numel() for name, p in parameters.items() if p.requires_grad),
            "names and shapes": _digest((name, tuple(shape)) for name, shape in shapes.items()),
            "weights": _digest(first),
        },
        "tokenizer": {"size": len(tokenizer), "chat template": _digest([tokenizer.chat_template])},
        "rewards": {"names": rewards.names, "weights": rewards.weights.tolist()},
        "train_dataset": {
            "rows": None if dataset is None else len(dataset),
            "prompts": _digest(dataset[index]["prompt"] for index in rows),
        },
    }
