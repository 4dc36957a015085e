"""What a run does when something breaks, decided by all processes alike: of each kind of fault, ``raise`` or ``skip``.

Docs: docs/faults.md. Checkpoints that cannot be written are in ``checkpoint``, rewards that fail in ``vlmkernels.rewards``.
"""

import os
import re
import socket
import time
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch.utils.data import Dataset
from transformers.utils import logging

from vlmkernels.data.images import ERRORS, ImageLimits
from vlmkernels.data.samples import Sample, read_sample
from vlmkernels.ops.checks import require

logger = logging.get_logger(__name__)

MOST_SKIPPED = 10  # optimiser steps in a row: weights that are not finite themselves would be kept for ever


def first_of_all(accelerator: Accelerator, error: str | None) -> str | None:
    """The first process's error, on every process; None where no process has one."""
    if accelerator.num_processes == 1:
        return error
    errors = gather_object([error])
    return next((f"process {rank}: {text}" for rank, text in enumerate(errors) if text is not None), None)


@contextmanager
def lost_processes_named(accelerator: Accelerator):
    """Inside, where a collective operation fails since another process has ended, the error says which one."""
    if accelerator.num_processes == 1:
        yield
        return
    processes = gather_object([(socket.gethostname(), os.getpid())])
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.distributed.DistError) or re.search("gloo|nccl", str(error), re.IGNORECASE)):
            raise
        lost = [f"process {rank} (pid {processes[rank][1]})" for rank in _lost(processes)]
        text = f"process {accelerator.process_index} stops: {', '.join(lost) or 'a process on another machine'}"
        raise RuntimeError(f"{text} has ended or cannot be reached; its own output, or its launcher's, says why") from error


def _lost(processes: list[tuple[str, int]]) -> list[int]:
    """Those of this machine that have ended, or do so within two seconds."""
    near = {rank: pid for rank, (host, pid) in enumerate(processes) if host == socket.gethostname()}
    for _ in range(20):
        lost = [rank for rank, pid in near.items() if not _runs(pid)]
        if lost:
            return lost
        time.sleep(0.1)
    return []


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"  # dead, and not waited for yet


class Samples(Dataset):
    """The samples of a dataset, each with the index that was asked for.

    A row that cannot be read raises ``ValueError`` with its index, or with ``on_bad="skip"`` the next one that can be read
    takes its place, so that all processes have as many: the same one whenever it is asked for.

    Args:
        bad: rows known not to be usable, and why.
    """

    def __init__(self, dataset, limits: ImageLimits, on_bad: str, bad: dict[int, str] | None = None):
        self.dataset, self.limits, self.on_bad, self.bad = dataset, limits, on_bad, dict(bad or {})

    def __len__(self) -> int:
        return len(self.dataset)

    def _read(self, index: int) -> Sample:
        try:
            row = self.dataset[index]
        except ERRORS as error:  # datasets decodes images here
            raise ValueError(f"sample {index}: cannot be read: {error}") from error
        return read_sample(row, index, limits=self.limits)

    def __getitem__(self, index: int) -> tuple[int, Sample]:
        for offset in range(len(self)):
            other = (index + offset) % len(self)
            if other in self.bad:
                continue
            try:
                return index, self._read(other)
            except (ValueError, TypeError) as error:
                if self.on_bad == "raise":
                    raise
                self.bad[other] = str(error)
                logger.warning("%s; another one takes its place (on_bad_sample='skip')", error)
        raise ValueError(f"train_dataset must hold a sample that can be read, got {next(iter(self.bad.values()))}")


class FiniteSteps:
    """Takes care that no optimiser step is made of losses or gradients that are not finite.

    ``observe`` each micro-batch, then call when the step is due: it raises ``FloatingPointError`` with the names of what is not
    finite, or with ``on_nonfinite="skip"`` removes the gradients, so that the step changes nothing, and returns True.
    """

    def __init__(self, accelerator: Accelerator, on_nonfinite: str):
        deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        rule = "be raise under DeepSpeed, which takes the step in the backward pass"
        require(not deepspeed or on_nonfinite == "raise", "on_nonfinite", rule, on_nonfinite)
        self.accelerator, self.on_nonfinite = accelerator, on_nonfinite
        self.losses: list[torch.Tensor] = []
        self.metrics: dict[str, torch.Tensor] = {}
        self.skipped_in_a_row = 0

    def observe(self, loss: torch.Tensor, metrics: dict[str, torch.Tensor]) -> None:
        self.losses.append(loss.detach())
        self.metrics = metrics

    def __call__(self, model: torch.nn.Module, step: int) -> bool:
        # A gradient scaler makes infinite gradients as it looks for its scale, and skips the steps of all that are not finite.
        scaled = self.accelerator.scaler is not None
        gradients = {} if scaled else {name: _local(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        total = torch.stack(self.losses).float().norm()
        if gradients:
            total = total + torch.nn.utils.get_total_norm(gradients.values()).to(total.device)
        bad = (~total.isfinite()).float()
        if not self.accelerator.reduce(bad, "sum").item():  # the same on all processes
            self.losses.clear()
            self.skipped_in_a_row = 0
            return False
        # First a process whose own loss it was: gradients have been added up over all of them.
        reason = first_of_all(self.accelerator, self._losses_that_are_not())
        reason = reason or first_of_all(self.accelerator, self._gradients_that_are_not(gradients))
        self.losses.clear()
        self.skipped_in_a_row += 1
        if self.on_nonfinite == "raise" or self.skipped_in_a_row > MOST_SKIPPED:
            again = f", after {MOST_SKIPPED} skipped steps in a row" if self.skipped_in_a_row > MOST_SKIPPED else ""
            raise FloatingPointError(f"step {step}{again}: {reason}")
        logger.warning("step %d is skipped (on_nonfinite='skip'): %s", step, reason)
        if not scaled:
            model.zero_grad(set_to_none=True)
        return True

    def _losses_that_are_not(self) -> str | None:
        if torch.stack(self.losses).isfinite().all():
            return None
        return _some("not finite:", ["the loss", *(name for name, x in self.metrics.items() if not x.isfinite().all())])

    @staticmethod
    def _gradients_that_are_not(gradients: dict[str, torch.Tensor]) -> str:
        names = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
        return _some("gradients not finite:", names) or "the norm of the gradients is not finite"


def _local(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient


def _some(text: str, names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{text} {', '.join(names[:most])}{more}" if names else ""
