"""Checks of the arguments of ``grpo_loss``, and their preparation for a backend."""

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


def check_layout(batch: Batch) -> None:
    """Types, shapes, dtypes and devices."""
    logps, advantages, cu_seqlens = batch.logps, batch.advantages, batch.cu_seqlens
    optional = ("old_logps", "ref_logps", "mask", "cu_seqlens", "rollout_logps", "entropy")
    for name in ("logps", "advantages", *(name for name in optional if getattr(batch, name) is not None)):
        require_tensor(name, getattr(batch, name))
        require_device(name, getattr(batch, name), logps.device, "logps")
    require(logps.is_floating_point(), "logps", "be floating point", logps.dtype, TypeError)
    if cu_seqlens is None:
        require(logps.dim() == 2, "logps", "be (B, T), or (N,) with cu_seqlens", tuple(logps.shape))
    else:
        require(batch.mask is None, "mask", "be None with cu_seqlens: leave out the tokens that do not count", "a tensor")
        require(logps.dim() == 1, "logps", "be (N,) with cu_seqlens", tuple(logps.shape))
        require_dtype("cu_seqlens", cu_seqlens, torch.int32)
        shape = tuple(cu_seqlens.shape)
        require(cu_seqlens.dim() == 1 and len(cu_seqlens) > 0, "cu_seqlens", "be (S + 1,), from 0 to N", shape)
    shapes = ((batch.num_sequences,), tuple(logps.shape))
    rule = f"be one per sequence, {shapes[0]}, or per token, {shapes[1]}"
    require(tuple(advantages.shape) in shapes, "advantages", rule, tuple(advantages.shape))
    if batch.mask is not None:
        require_dtype("mask", batch.mask, torch.bool)
    for name in ("old_logps", "ref_logps", "mask", "rollout_logps", "entropy"):
        if getattr(batch, name) is not None:
            require_shape(name, getattr(batch, name), logps.shape, "logps")
    for name in ("entropy_threshold", "num_items"):
        value = getattr(batch, name)
        if isinstance(value, torch.Tensor):
            require(value.dim() == 0, name, "be a number or a () tensor", tuple(value.shape))
        elif value is not None:
            require_number(name, value, "be a number or a () tensor")
            require(value >= 0, name, "be >= 0", value)
    if isinstance(batch.entropy_threshold, torch.Tensor):
        require_device("entropy_threshold", batch.entropy_threshold, logps.device, "logps")
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
        rule = f"be given with {setting} = {getattr(config, setting)!r}"
        require(not needed or getattr(batch, name) is not None, name, rule, None)
    unused = config.rollout_correction is None and config.off_policy_mask_threshold is None
    rule = "be None unless config.rollout_correction or config.off_policy_mask_threshold uses it"
    require(not unused or batch.rollout_logps is None, "rollout_logps", rule, "a tensor")


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
    return _Widened.apply(x, dtype) if x.dtype == torch.float16 else x.to(dtype)


def prepare(batch: Batch, config: GRPOLossConfig) -> Batch:
    """All floating tensors in the dtype of computation, gradients only where one goes, what is not read left out."""
    dtype = torch.promote_types(batch.logps.dtype, torch.float32)
    fixed = {}
    for name in ("advantages", "old_logps", "ref_logps", "rollout_logps"):
        tensor = getattr(batch, name)
        fixed[name] = None if tensor is None else tensor.detach().to(dtype)
    if not config.beta:
        fixed["ref_logps"] = None
    for name, device in (("entropy_threshold", batch.logps.device), ("num_items", "cpu")):
        value = getattr(batch, name)
        if isinstance(value, torch.Tensor):
            fixed[name] = value.detach().to(dtype)
        elif value is not None:
            fixed[name] = torch.full((), float(value), dtype=dtype, device=device)
    if config.top_entropy_quantile == 1:
        fixed["entropy_threshold"] = None
    entropy = None if batch.entropy is None else widened(batch.entropy, dtype)
    steps = float(batch.accumulation_steps)
    return batch._replace(logps=widened(batch.logps, dtype), entropy=entropy, accumulation_steps=steps, **fixed)


def check_values(batch: Batch) -> None:
    """cu_seqlens go from 0 to N without a step back. CPU tensors only: on a GPU this would wait for the device."""
    cu_seqlens = batch.cu_seqlens
    if cu_seqlens is None or cu_seqlens.device.type != "cpu":
        return
    num, values = len(batch.logps), cu_seqlens.tolist()
    require(values[0] == 0 and values[-1] == num, "cu_seqlens", f"go from 0 to {num}, the tokens of logps", values)
    require(bool((cu_seqlens.diff() >= 0).all()), "cu_seqlens", "not decrease", values)
