"""Checks and preparation of the arguments of ``linear_logps``."""

import torch

from vlmkernels.ops.checks import (
    require_device,
    require_dtype,
    require_factor,
    require_nowhere,
    require_shape,
    require_targets,
    require_tensor,
)
from vlmkernels.ops.linear_logps.fused import is_faster
from vlmkernels.ops.linear_logps.inputs import Operands
from vlmkernels.ops.linear_logps.parallel import VocabParallel, gather_dtensor
from vlmkernels.ops.linear_logps.sweep import default_chunk_bytes, row_bytes


def operands(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, prefix: str = ""
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return hidden states, weight and bias as a linear layer would use them: cast under autocast, with DTensors gathered.

    ``prefix`` is that of the arguments, for example "teacher_".
    """
    require_tensor(f"{prefix}hidden", hidden)
    require_tensor(f"{prefix}weight", weight)
    weight = gather_dtensor(f"{prefix}weight", weight)
    if bias is not None:
        require_tensor(f"{prefix}bias", bias)
        bias = gather_dtensor(f"{prefix}bias", bias)
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(device))
        if weight.dtype not in (hidden.dtype, torch.float32):
            weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    return hidden, weight, bias


def check_parallel(weight: torch.Tensor, vocab_parallel: VocabParallel | None) -> None:
    """Check that the rows of ``weight`` lie within the vocabulary of ``vocab_parallel``."""
    if vocab_parallel is None:
        return
    if not isinstance(vocab_parallel, VocabParallel) or vocab_parallel.group is None:
        raise TypeError(f"vocab_parallel must be None or a VocabParallel with a group, got {vocab_parallel}")
    start, size = vocab_parallel.start, vocab_parallel.size
    if start < 0 or start + len(weight) > size:
        raise ValueError(
            f"vocab_parallel must place the {len(weight)} rows of weight within its vocabulary, got start {start}, size {size}"
        )


def check_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    prefix: str = "",
) -> None:
    """Check shapes, dtypes, devices and factors of a head; ``prefix`` is that of its arguments, for example "teacher_"."""
    states, matrix, offset, scale, cap = (f"{prefix}{x}" for x in ("hidden", "weight", "bias", "logit_scale", "softcap"))
    require_dtype(states, hidden, torch.float32, torch.bfloat16, torch.float16, torch.float64)
    require_dtype(matrix, weight, *dict.fromkeys((hidden.dtype, torch.promote_types(hidden.dtype, torch.float32))))
    width = hidden.shape[-1] if hidden.dim() else 0
    if weight.dim() != 2 or weight.shape[1] != width or len(weight) == 0:
        raise ValueError(
            f"{matrix} must be (V, H) with V >= 1 and the width of {states}, H = {width}, got {tuple(weight.shape)}"
        )
    if bias is not None:
        require_dtype(offset, bias, weight.dtype)
        require_shape(offset, bias, weight.shape[:1], f"the rows of {matrix}")
    require_factor("temperature", temperature)
    require_factor(scale, logit_scale)
    if softcap is None:
        require_factor(f"{scale} / temperature", logit_scale / temperature)
    else:
        require_factor(cap, softcap)
        require_factor(f"{scale} / {cap}", logit_scale / softcap)
    for name, tensor in {matrix: weight, offset: bias}.items():
        if tensor is not None:
            require_device(name, tensor, hidden.device, states)


def check(inputs: Operands, temperature: float, logit_scale: float, softcap: float | None, mask_name: str = "mask") -> None:
    """Check shapes, dtypes, devices and factors."""
    hidden = inputs.hidden
    check_head(hidden, inputs.weight, inputs.bias, temperature, logit_scale, softcap)
    require_targets("hidden", hidden, "hidden without its width", inputs.targets, inputs.mask, inputs.rows, mask_name)


def check_logits(hidden: torch.Tensor, stats: torch.Tensor, name: str = "hidden") -> None:
    """Check that no logit overflowed. Only those of fp16 on the CPU have a smaller range than fp32.

    The maximum of each row is stats[:, 0].
    """
    if hidden.device.type == "cpu" and hidden.dtype == torch.float16:
        maximum = stats[:, 0]
        require_nowhere(maximum.isposinf(), name, "have logits within fp16's range, up to 65504", maximum)


def check_bytes(name: str, value: int) -> None:
    """Check that ``value`` is an amount of memory."""
    if not (isinstance(value, int) and 0 <= value < 2**63):
        raise ValueError(f"{name} must be an integer in [0, 2**63), got {value!r}")


def check_chunk(name: str, value: int, hidden: torch.Tensor, vocab: int) -> None:
    """Check that ``value`` is an amount of memory that holds a row of logits."""
    check_bytes(name, value)
    least = row_bytes(hidden, vocab)
    if value < least:
        raise ValueError(f"{name} must hold one row of logits, {least} bytes, got {value}")


def budget(inputs: Operands, chunk_bytes: int | None, keep_logits_bytes: int | None, backend: str) -> tuple[int, int]:
    """Check chunk_bytes and keep_logits_bytes, and return them with None replaced by the default."""
    hidden, weight, bias, num = inputs.hidden, inputs.weight, inputs.bias, inputs.targets.numel()
    needed = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    if chunk_bytes is None:
        chunk_bytes = 0 if not needed and is_faster(hidden, num, backend) else default_chunk_bytes(hidden.device)
    least = row_bytes(hidden, len(weight))
    if keep_logits_bytes is not None:
        check_bytes("keep_logits_bytes", keep_logits_bytes)
    if chunk_bytes == 0 and needed:
        raise ValueError(f"chunk_bytes must hold one row of logits, {least} bytes, if a gradient is needed, got 0")
    if chunk_bytes != 0:
        check_chunk("chunk_bytes", chunk_bytes, hidden, len(weight))
    if not needed:
        return chunk_bytes, 0
    if keep_logits_bytes is None:
        keep_logits_bytes = chunk_bytes if num * least <= chunk_bytes else 0
    return chunk_bytes, keep_logits_bytes
