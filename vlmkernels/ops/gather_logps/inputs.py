"""The arguments of the operators and kernels of ``gather_logps``, for K results from N rows of logits."""

from typing import NamedTuple

import torch


class Inputs(NamedTuple):
    """The arguments of the forward operator, in the order of its schema."""

    logits: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor | None
    rows: torch.Tensor | None
    temperature: float
    return_entropy: bool
    inplace_backward: bool
    backend: str


class Gradient(NamedTuple):
    """The arguments of the backward operators after ``logits``, in the order of their schemas."""

    dlogp: torch.Tensor | None
    dentropy: torch.Tensor | None
    targets: torch.Tensor
    entropy: torch.Tensor
    stats: torch.Tensor
    mask: torch.Tensor | None
    rows: torch.Tensor | None
    temperature: float
    backend: str


class Outputs(NamedTuple):
    """The results of the forward pass, in the shape of targets."""

    logp: torch.Tensor
    entropy: torch.Tensor  # (0,) if it is not requested
    stats: torch.Tensor  # (..., 2): m, the maximum of the row x or slightly less, and log sum exp((x - m) / temperature)


class Results(NamedTuple):
    """The inputs of the backward kernels, one per result. With ``rows`` they are sorted by row."""

    dlogp: torch.Tensor  # (K,)
    targets: torch.Tensor  # (K,)
    stats: torch.Tensor  # (K, 2)
    dentropy: torch.Tensor | None  # (K,)
    entropy: torch.Tensor | None  # (K,)
    mask: torch.Tensor | None  # (K,)
    offsets: torch.Tensor | None  # (N + 1,): row n owns the results [offsets[n], offsets[n + 1]); None: row k owns result k

    def contiguous(self) -> "Results":
        """The same values in contiguous tensors."""
        return Results._make(t if t is None else t.contiguous() for t in self)
