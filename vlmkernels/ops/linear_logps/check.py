"""Checks of the arguments of ``linear_logps``, and what it makes of them."""

import torch

from vlmkernels.ops.checks import require, require_device, require_dtype, require_factor, require_shape, require_targets
from vlmkernels.ops.linear_logps.fused import is_faster
from vlmkernels.ops.linear_logps.parallel import VocabParallel, whole
from vlmkernels.ops.linear_logps.sweep import default_chunk_bytes, row_bytes


def operands(hidden, weight, bias):
    """The operands as a linear layer sees them: cast under autocast, DTensors gathered."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        sound = isinstance(tensor, torch.Tensor) or (name == "bias" and tensor is None)
        require(sound, name, "be a tensor", type(tensor).__name__, TypeError)
    weight, bias = whole("weight", weight), whole("bias", bias)
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(device))
        if weight.dtype not in (hidden.dtype, torch.float32):
            weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    return hidden, weight, bias


def check_parallel(weight, vocab_parallel) -> None:
    """A shard lies within its vocabulary."""
    if vocab_parallel is None:
        return
    sound = isinstance(vocab_parallel, VocabParallel) and vocab_parallel.group is not None
    require(sound, "vocab_parallel", "be None or a VocabParallel with a group", vocab_parallel, TypeError)
    _, start, size = vocab_parallel
    rule = f"place the {len(weight)} rows of weight within its vocabulary"
    require(start >= 0 and start + len(weight) <= size, "vocab_parallel", rule, f"start {start}, size {size}")


def check(hidden, weight, bias, targets, mask, rows, temperature, logit_scale, softcap) -> None:
    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    require_dtype("hidden", hidden, *floats)
    require_dtype("weight", weight, *dict.fromkeys((hidden.dtype, torch.promote_types(hidden.dtype, torch.float32))))
    width = hidden.shape[-1] if hidden.dim() else 0
    rule = f"be (V, H) with V >= 1 and the width of hidden, H = {width}"
    require(weight.dim() == 2 and weight.shape[1] == width and len(weight) > 0, "weight", rule, tuple(weight.shape))
    if bias is not None:
        require_dtype("bias", bias, weight.dtype)
        require_shape("bias", bias, weight.shape[:1], "the rows of weight")
    require_factor("temperature", temperature)
    require_factor("logit_scale", logit_scale)
    if softcap is None:
        require_factor("logit_scale / temperature", logit_scale / temperature)
    else:
        require_factor("softcap", softcap)
        require_factor("logit_scale / softcap", logit_scale / softcap)
    for name, tensor in {"weight": weight, "bias": bias}.items():
        if tensor is not None:
            require_device(name, tensor, hidden.device, "hidden")
    require_targets("hidden", hidden, "hidden without its width", targets, mask, rows)


def budget(hidden, weight, bias, num, chunk_bytes, keep_logits_bytes, backend) -> tuple[int, int]:
    """chunk_bytes and keep_logits_bytes, or what stands for them where they are None."""
    needed = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    if chunk_bytes is None:
        chunk_bytes = 0 if not needed and is_faster(hidden, num, backend) else default_chunk_bytes(hidden.device)
    least = row_bytes(hidden, len(weight))
    for name, value in (("chunk_bytes", chunk_bytes), ("keep_logits_bytes", keep_logits_bytes)):
        sound = value is None or (isinstance(value, int) and 0 <= value < 2**63)
        require(sound, name, "be an integer in [0, 2**63)", repr(value))
    rule = f"hold one row of logits, {least} bytes{', or where no gradient is needed be 0' * (chunk_bytes == 0)}"
    require(chunk_bytes >= least or (chunk_bytes == 0 and not needed), "chunk_bytes", rule, chunk_bytes)
    if not needed:
        return chunk_bytes, 0
    if keep_logits_bytes is None:
        keep_logits_bytes = chunk_bytes if num * least <= chunk_bytes else 0
    return chunk_bytes, keep_logits_bytes
