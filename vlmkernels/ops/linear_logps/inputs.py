"""The arguments of the operators and kernels of ``linear_logps``."""

from typing import NamedTuple

import torch


class Operands(NamedTuple):
    """The tensors of a call: the first arguments of the forward operator, in the order of its schema."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    targets: torch.Tensor
    mask: torch.Tensor | None
    rows: torch.Tensor | None


class Settings(NamedTuple):
    """The arguments of the forward operator after ``Operands``."""

    temperature: float
    logit_scale: float
    softcap: float | None
    vocab_start: int
    vocab_size: int
    chunk_bytes: int
    keep_logits_bytes: int
    segment_bytes: int
    backend: str


class Outputs(NamedTuple):
    """The results of the forward operator."""

    logp: torch.Tensor  # like targets
    entropy: torch.Tensor  # like targets
    stats: torch.Tensor  # (..., 2), see reference.py
    kept: torch.Tensor  # the logits of the first results, kept for the backward pass


class Gradient(NamedTuple):
    """The arguments of the backward operator before ``Operands`` and ``Settings``."""

    dlogp: torch.Tensor
    dentropy: torch.Tensor | None
    logp: torch.Tensor
    entropy: torch.Tensor
    stats: torch.Tensor
    kept: torch.Tensor  # overwritten by the gradient of these logits
    weight_grad: torch.Tensor | None  # the gradient of the weight is added to it, instead of returned
    needed: list[bool]  # whether hidden, weight and bias need gradients


class SelectedRows(NamedTuple):
    """Inputs and results of the kernels, with one element per row of logits."""

    targets: torch.Tensor  # (n,) int64; negative: a token of another part of the vocabulary; V or more: out of range
    logp: torch.Tensor  # (n,)
    entropy: torch.Tensor  # (n,)
    stats: torch.Tensor  # (n, 2)
    dlogp: torch.Tensor | None = None  # (n,), in the backward pass
    dentropy: torch.Tensor | None = None  # (n,); None: 0

    def chunk(self, part: slice) -> "SelectedRows":
        """Return the rows of ``part`` as views."""
        return SelectedRows._make(x if x is None else x[part] for x in self)
