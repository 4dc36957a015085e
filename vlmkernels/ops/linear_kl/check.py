"""Checks of the arguments of ``linear_kl``."""

import torch

from vlmkernels.ops.checks import require_device, require_dtype, require_indices, require_number, require_shape
from vlmkernels.ops.linear_kl.inputs import Operands
from vlmkernels.ops.linear_logps.check import check_chunk, check_head
from vlmkernels.ops.linear_logps.sweep import default_chunk_bytes

# The least distance of beta to 0 and 1 that kernels tell apart from them: they compute in fp32.
BETA_STEP = 1e-6


def check_beta(beta: float, name: str = "beta") -> None:
    """Check that ``beta`` is a number in [0, 1], and 0 or 1 if it is nearer to them than ``BETA_STEP``."""
    require_number(name, beta, "be in [0, 1]")
    if not 0 <= beta <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {beta}")
    if beta not in (0, 1) and not BETA_STEP <= beta <= 1 - BETA_STEP:
        raise ValueError(f"{name} must be 0, 1 or in [{BETA_STEP:g}, 1 - {BETA_STEP:g}], got {beta}")


def check(
    inputs: Operands,
    temperature: float,
    scales: tuple[float, float],
    softcaps: tuple[float | None, float | None],
    token_weights: torch.Tensor | None,
) -> None:
    """Check shapes, dtypes, devices and factors."""
    hidden, teacher_hidden = inputs.hidden, inputs.teacher_hidden
    check_head(hidden, inputs.weight, inputs.bias, temperature, scales[0], softcaps[0])
    check_head(
        teacher_hidden, inputs.teacher_weight, inputs.teacher_bias, temperature, scales[1], softcaps[1], prefix="teacher_"
    )
    require_device("teacher_hidden", teacher_hidden, hidden.device, "hidden")
    vocab, teacher_vocab = len(inputs.weight), len(inputs.teacher_weight)
    if vocab != teacher_vocab:
        raise ValueError(f"teacher_weight must have the vocabulary of weight, {vocab} tokens, got {teacher_vocab}")
    selections = {"mask": (inputs.mask, torch.bool), "rows": (inputs.rows, torch.int64)}
    selections["teacher_rows"] = inputs.teacher_rows, torch.int64
    for name, (tensor, dtype) in selections.items():
        if tensor is not None:
            require_dtype(name, tensor, dtype)
            require_device(name, tensor, hidden.device, "hidden")
    shape = hidden.shape[:-1] if inputs.rows is None else inputs.rows.shape
    owner = "hidden without its width" if inputs.rows is None else "rows"
    if inputs.teacher_rows is None:
        if teacher_hidden.shape[:-1] != shape:
            raise ValueError(
                f"teacher_hidden must have the shape of {owner}, {tuple(shape)}, before its width,"
                f" got {tuple(teacher_hidden.shape)}"
            )
    else:
        require_shape("teacher_rows", inputs.teacher_rows, shape, owner)
    for name, tensor in {"mask": inputs.mask, "token_weights": token_weights}.items():
        if tensor is not None:
            require_shape(name, tensor, shape, owner)
    if token_weights is not None:
        require_device("token_weights", token_weights, hidden.device, "hidden")
        if token_weights.requires_grad:
            raise ValueError("token_weights must not require gradients, got requires_grad=True")


def check_rows(inputs: Operands) -> None:
    """Check on the CPU that the indices are in range."""
    for name, rows, hidden in (
        ("rows", inputs.rows, inputs.hidden),
        ("teacher_rows", inputs.teacher_rows, inputs.teacher_hidden),
    ):
        if rows is not None:
            leading = hidden.shape[:-1]
            owner = "hidden" if name == "rows" else "teacher_hidden"
            require_indices(name, rows, leading.numel(), f"the rows of {owner} {tuple(leading)}", inputs.mask)


def support_size(top_k: int | None, vocab: int) -> int:
    """Check ``top_k`` and return the number of tokens besides the event of all others; 0: all tokens."""
    if top_k is None:
        return 0
    require_number("top_k", top_k, "be a positive integer or None", int)
    if top_k < 1:
        raise ValueError(f"top_k must be a positive integer or None, got {top_k}")
    return 0 if top_k >= vocab - 1 else int(top_k)  # the event of a single token is that token


def chunk_size(inputs: Operands, chunk_bytes: int | None) -> int:
    """Check ``chunk_bytes``, and return it with None replaced by the default."""
    if chunk_bytes is None:
        return default_chunk_bytes(inputs.hidden.device)
    check_chunk("chunk_bytes", chunk_bytes, inputs.hidden, len(inputs.weight))
    return chunk_bytes
