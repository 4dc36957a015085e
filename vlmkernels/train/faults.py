"""Faults of a run, handled alike on all processes: lost processes, and losses or gradients that are not finite.

See docs/faults.md. ``vlmkernels.train.checkpoint`` handles checkpoints that cannot be written, ``vlmkernels.rewards`` reward
functions that fail, and ``vlmkernels.data`` rows that cannot be read.
"""

import os
import re
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers.utils import logging

logger = logging.get_logger(__name__)

MAX_SKIPPED = 10  # optimizer steps in a row; if the weights are not finite, no later step can succeed


def first_error(accelerator: Accelerator, error: str | None) -> str | None:
    """Return, on every process, the error of the first process that has one; None if no process has one."""
    if accelerator.num_processes == 1:
        return error
    errors = gather_object([error])
    return next((f"process {rank}: {text}" for rank, text in enumerate(errors) if text is not None), None)


@contextmanager
def name_lost_processes(accelerator: Accelerator) -> Iterator[None]:
    """If a collective inside fails because another process ended, raise an error that names the process."""
    if accelerator.num_processes == 1:
        yield
        return
    processes = gather_object([(socket.gethostname(), os.getpid())])
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.distributed.DistError) or re.search("gloo|nccl", str(error), re.IGNORECASE)):
            raise
        lost = [f"process {rank} (pid {processes[rank][1]})" for rank in _lost_ranks(processes)]
        names = ", ".join(lost) or "a process on another machine"
        raise RuntimeError(
            f"process {accelerator.process_index} stops: {names} has ended or cannot be reached; see its output"
        ) from error


def _lost_ranks(processes: list[tuple[str, int]]) -> list[int]:
    """Return the ranks of processes on this machine that have ended or end within two seconds.

    Args:
        processes: host name and process id of each rank.
    """
    local = {rank: pid for rank, (host, pid) in enumerate(processes) if host == socket.gethostname()}
    for _ in range(20):
        lost = [rank for rank, pid in local.items() if not _is_running(pid)]
        if lost:
            return lost
        time.sleep(0.1)
    return []


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"  # a zombie has ended, although its parent has not waited for it


class FiniteSteps:
    """Prevents optimizer steps from losses or gradients that are NaN or infinite.

    Call ``observe`` for each micro-batch, then the object itself before the optimizer step.

    Args:
        on_nonfinite: "raise", or "skip" to skip such steps.
    """

    def __init__(self, accelerator: Accelerator, on_nonfinite: str) -> None:
        self.accelerator, self.on_nonfinite = accelerator, on_nonfinite
        self.losses: list[torch.Tensor] = []
        self.metrics: dict[str, torch.Tensor] = {}
        self.skipped_in_a_row = 0

    def observe(self, loss: torch.Tensor, metrics: dict[str, torch.Tensor]) -> None:
        """Note the loss and the metrics of a micro-batch."""
        self.losses.append(loss.detach())
        self.metrics = metrics

    def __call__(self, model: torch.nn.Module, step: int) -> bool:
        """Check the losses since the last step and the model's gradients.

        Args:
            step: the number of this optimizer step, for messages.

        Returns:
            Whether the step is skipped. The gradients are then removed, so that the optimizer changes nothing.

        Raises:
            FloatingPointError: a loss or a gradient is not finite and on_nonfinite is "raise", or ``MAX_SKIPPED`` steps in a
                row were skipped. The message names what is not finite.
        """
        # A gradient scaler makes gradients infinite while it searches for its scale, and skips such steps itself.
        has_scaler = self.accelerator.scaler is not None
        gradients = {} if has_scaler else {n: _local(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        total = torch.stack(self.losses).float().norm()
        if gradients:
            total = total + torch.nn.utils.get_total_norm(gradients.values()).to(total.device)
        is_bad = (~total.isfinite()).float()
        if not self.accelerator.reduce(is_bad, "sum").item():  # the same on all processes
            self.losses.clear()
            self.skipped_in_a_row = 0
            return False
        # Prefer a process whose own loss is not finite: gradients are already summed over all processes.
        reason = first_error(self.accelerator, self._nonfinite_losses())
        reason = reason or first_error(self.accelerator, self._nonfinite_gradients(gradients))
        self.losses.clear()
        self.skipped_in_a_row += 1
        if self.on_nonfinite == "raise" or self.skipped_in_a_row > MAX_SKIPPED:
            after = f", after {MAX_SKIPPED} skipped steps in a row" if self.skipped_in_a_row > MAX_SKIPPED else ""
            raise FloatingPointError(f"step {step}{after}: {reason}")
        logger.warning("step %d is skipped (on_nonfinite='skip'): %s", step, reason)
        if not has_scaler:
            model.zero_grad(set_to_none=True)
        return True

    def _nonfinite_losses(self) -> str | None:
        if torch.stack(self.losses).isfinite().all():
            return None
        return _listed("not finite:", ["the loss", *(name for name, x in self.metrics.items() if not x.isfinite().all())])

    @staticmethod
    def _nonfinite_gradients(gradients: dict[str, torch.Tensor]) -> str:
        names = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
        return _listed("gradients not finite:", names) or "the norm of the gradients is not finite"


def _local(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient


def _listed(text: str, names: Iterable[str], max_names: int = 3) -> str:
    """Return the text followed by the first names, or an empty string if there are no names."""
    names = list(names)
    more = f" and {len(names) - max_names} more" if len(names) > max_names else ""
    return f"{text} {', '.join(names[:max_names])}{more}" if names else ""
