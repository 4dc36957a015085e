"""Small inputs for contracts and adapters."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


def grid(*shape: int) -> torch.Tensor:
    """Return fp32 multiples of 1/4 in [-2, 2], which each dtype represents, in an order in which rows differ."""
    index = torch.arange(torch.Size(shape).numel())
    return ((index * index * 3 + index * 7) % 17 - 8).view(shape) / 4


def binary_logits(logps: torch.Tensor) -> torch.Tensor:
    """Return logits (..., 2) of two tokens, under which the log-probability of token 0 is ``logps`` (...), differentiably.

    A loss that starts from logits then computes that of given log-probabilities, and its gradient by them. In dtype d its
    relative error is up to eps(d) / (1 - exp(logp)), because logits get the gradient 1 - exp(logp). No logits have a
    log-probability that is NaN or >= 0: the result is NaN, whose gradient is that of the logits, so that NaN shows in it.
    """
    valid = logps < 0
    negative = logps.where(valid, -1)  # the gradient of where is not 0 * NaN
    logits = torch.stack([negative, torch.log(-torch.expm1(negative))], -1)
    return logits.where(valid.unsqueeze(-1), logps.unsqueeze(-1) + torch.nan)


def upstream(logps: torch.Tensor) -> torch.Tensor:
    """Return a gradient of log-probabilities: advantages of both signs, different for adjacent tokens."""
    index = torch.arange(logps.numel(), device=logps.device)
    return ((index % 5 - 1.5) / 2).view(logps.shape).to(logps.dtype)


@contextmanager
def one_of(num_processes: int) -> Iterator[None]:
    """Within the block, torch.distributed says that this process is one of ``num_processes``, which communicate nothing.

    For code that reads the number of processes, and gathers only what is logged.
    """
    if num_processes == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_processes)
    try:
        yield
    finally:
        dist.destroy_process_group()
