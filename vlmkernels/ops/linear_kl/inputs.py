"""The arguments of the operators and kernels of ``linear_kl``."""

from typing import NamedTuple

import torch

from vlmkernels.ops.linear_logps.sweep import Head


class Operands(NamedTuple):
    """The tensors of a call: the first arguments of the forward operators, in the order of their schema."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    teacher_hidden: torch.Tensor
    teacher_weight: torch.Tensor
    teacher_bias: torch.Tensor | None
    mask: torch.Tensor | None
    rows: torch.Tensor | None
    teacher_rows: torch.Tensor | None


class Settings(NamedTuple):
    """The arguments of the forward operators after ``Operands``."""

    beta: float
    temperature: float
    logit_scale: float
    softcap: float | None
    teacher_logit_scale: float
    teacher_softcap: float | None
    top_k: int  # 0: the whole vocabulary
    chunk_bytes: int
    keep_logits: bool  # for the backward pass
    segment_bytes: int
    backend: str


class Outputs(NamedTuple):
    """The results of the forward operator of divergences per token. The first four are in the shape of the results."""

    divergence: torch.Tensor  # (...)
    stats: torch.Tensor  # (..., 5), see reference.py
    support: torch.Tensor  # (..., k), the teacher's most probable tokens; k = 0 without top_k
    teacher_logps: torch.Tensor  # (..., k + 1), of these tokens and of all others together; (..., 0) without top_k
    kept: torch.Tensor  # the logits of the student, kept for the backward pass
    teacher_kept: torch.Tensor


class Gradient(NamedTuple):
    """The arguments of the backward operator before ``Operands`` and ``Settings``."""

    ddivergence: torch.Tensor
    stats: torch.Tensor
    support: torch.Tensor
    teacher_logps: torch.Tensor
    kept: torch.Tensor  # overwritten by the gradient of these logits
    teacher_kept: torch.Tensor
    needed: list[bool]  # whether hidden, weight and bias need gradients


class Pair(NamedTuple):
    """The heads of student and teacher, and the divergence between them."""

    student: Head
    teacher: Head
    beta: float


class SelectedRows(NamedTuple):
    """Inputs and results of the kernels, with one element per row of logits."""

    divergence: torch.Tensor  # (n,)
    stats: torch.Tensor  # (n, 5)
    support: torch.Tensor  # (n, k) int64
    teacher_logps: torch.Tensor  # (n, k + 1), or (n, 0)
    upstream: torch.Tensor | None = None  # (n,), multiplies the gradient of the logits

    def chunk(self, part: slice) -> "SelectedRows":
        """Return the rows of ``part`` as views."""
        return SelectedRows._make(x if x is None else x[part] for x in self)
