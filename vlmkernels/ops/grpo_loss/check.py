"""Checks of the arguments of ``grpo_loss``, and their preparation for a backend."""

from itertools import pairwise

import torch

from vlmkernels.ops.checks import (
    require,
    require_device,
    require_dtype,
    require_number,
    require_positive,
    require_shape,
    require_tensor,
)
from vlmkernels.ops.grpo_loss.batch import Batch
from vlmkernels.ops.grpo_loss.config import GRPOLossConfig

# The optional arguments that have the shape of logps, and cu_seqlens.
PER_TOKEN = ("old_logps", "ref_logps", "mask", "rollout_logps", "entropy")
OPTIONAL = ("old_logps", "ref_logps", "mask", "cu_seqlens", "rollout_logps", "entropy")


def check_layout(batch: Batch) -> None:
    """Types, shapes, dtypes and devices."""
    logps, advantages, cu_seqlens, mask = batch.logps, batch.advantages, batch.cu_seqlens, batch.mask
    require_tensor("logps", logps)
    require_tensor("advantages", advantages)
    device, shape = logps.device, logps.shape
    require_device("advantages", advantages, device, "logps")
    for name in OPTIONAL:
        tensor = getattr(batch, name)
        if tensor is not None:
            require_tensor(name, tensor)
            require_device(name, tensor, device, "logps")
    if not logps.is_floating_point():
        raise TypeError(f"logps must be floating point, got {logps.dtype}")
    if cu_seqlens is None:
        if logps.dim() != 2:
            raise ValueError(f"logps must be (B, T), or (N,) with cu_seqlens, got {tuple(shape)}")
    else:
        if mask is not None:
            raise ValueError("mask must be None with cu_seqlens: leave out the tokens that do not count, got a tensor")
        if logps.dim() != 1:
            raise ValueError(f"logps must be (N,) with cu_seqlens, got {tuple(shape)}")
        require_dtype("cu_seqlens", cu_seqlens, torch.int32)
        if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
            raise ValueError(f"cu_seqlens must be (S + 1,), from 0 to N, got {tuple(cu_seqlens.shape)}")
    sequences = (batch.num_sequences,)
    if advantages.shape != sequences and advantages.shape != shape:
        rule = f"be one per sequence, {sequences}, or per token, {tuple(shape)}"
        raise ValueError(f"advantages must {rule}, got {tuple(advantages.shape)}")
    if mask is not None:
        require_dtype("mask", mask, torch.bool)
    for name in PER_TOKEN:
        tensor = getattr(batch, name)
        if tensor is not None:
            require_shape(name, tensor, shape, "logps")
    for name in ("entropy_threshold", "num_items"):
        value = getattr(batch, name)
        if isinstance(value, torch.Tensor):
            if value.dim() != 0:
                raise ValueError(f"{name} must be a number or a () tensor, got {tuple(value.shape)}")
        elif value is not None:
            require_number(name, value, "be a number or a () tensor")
            require(value >= 0, name, "be >= 0", value)
    if isinstance(batch.entropy_threshold, torch.Tensor):
        require_device("entropy_threshold", batch.entropy_threshold, device, "logps")
    require_positive("accumulation_steps", batch.accumulation_steps)


def check_config(batch: Batch, config: GRPOLossConfig) -> None:
    """What the configuration needs is there, and rollout_logps only where it uses them."""
    require(isinstance(config, GRPOLossConfig), "config", "be a GRPOLossConfig", config, TypeError)
    for setting, name, needed in (
        ("beta", "ref_logps", config.beta > 0),
        ("rollout_correction", "rollout_logps", config.rollout_correction is not None),
        ("top_entropy_quantile", "entropy", config.top_entropy_quantile < 1),
        ("entropy_coef", "entropy", config.entropy_coef != 0),
    ):
        if needed and getattr(batch, name) is None:
            raise ValueError(f"{name} must be given with {setting} = {getattr(config, setting)!r}, got None")
    unused = config.rollout_correction is None and config.off_policy_mask_threshold is None
    if unused and batch.rollout_logps is not None:
        rule = "be None unless config.rollout_correction or config.off_policy_mask_threshold uses it"
        raise ValueError(f"rollout_logps must {rule}, got a tensor")


class _Widened(torch.autograd.Function):
    """fp16 in a wider dtype; of its gradient, e^20 times a weight, what fp16 has no number for is the greatest it has."""

    @staticmethod
    def forward(ctx, x, dtype):
        return x.to(dtype)

    @staticmethod
    def backward(ctx, grad):
        greatest = torch.finfo(torch.float16).max
        return grad.clamp(-greatest, greatest).half(), None


def widened(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if x.dtype == dtype:
        return x
    return _Widened.apply(x, dtype) if x.dtype == torch.float16 else x.to(dtype)


def constant(x: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """``x`` in ``dtype``, without a gradient."""
    if x is None or (x.dtype == dtype and not x.requires_grad):
        return x
    return x.detach().to(dtype)


def prepare(batch: Batch, config: GRPOLossConfig) -> Batch:
    """All floating tensors in the dtype of computation, gradients only where one goes, what is not read left out."""
    dtype = torch.promote_types(batch.logps.dtype, torch.float32)

    def scalar(value, device):
        if value is None or isinstance(value, torch.Tensor):
            return constant(value, dtype)
        return torch.full((), float(value), dtype=dtype, device=device)

    return Batch(
        logps=widened(batch.logps, dtype),
        advantages=constant(batch.advantages, dtype),
        old_logps=constant(batch.old_logps, dtype),
        ref_logps=constant(batch.ref_logps, dtype) if config.beta else None,
        mask=batch.mask,
        cu_seqlens=batch.cu_seqlens,
        rollout_logps=constant(batch.rollout_logps, dtype),
        entropy=None if batch.entropy is None else widened(batch.entropy, dtype),
        entropy_threshold=scalar(batch.entropy_threshold, batch.logps.device) if config.top_entropy_quantile < 1 else None,
        num_items=scalar(batch.num_items, "cpu"),
        accumulation_steps=float(batch.accumulation_steps),
    )


def check_values(batch: Batch) -> None:
    """cu_seqlens go from 0 to N without a step back. CPU tensors only: on a GPU this would wait for the device."""
    cu_seqlens = batch.cu_seqlens
    if cu_seqlens is None or cu_seqlens.device.type != "cpu":
        return
    num, values = len(batch.logps), cu_seqlens.tolist()
    if values[0] != 0 or values[-1] != num:
        raise ValueError(f"cu_seqlens must go from 0 to {num}, the tokens of logps, got {values}")
    if any(stop < start for start, stop in pairwise(values)):
        raise ValueError(f"cu_seqlens must not decrease, got {values}")
