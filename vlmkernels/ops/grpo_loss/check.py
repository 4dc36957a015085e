"""Checks of the arguments of ``grpo_loss``, and their preparation for a backend."""

from itertools import pairwise
from typing import Any

import torch

from vlmkernels.ops.checks import (
    require_device,
    require_dtype,
    require_number,
    require_positive,
    require_shape,
    require_tensor,
)
from vlmkernels.ops.grpo_loss.config import PERCEPTION_WEIGHTS, GRPOLossConfig
from vlmkernels.ops.grpo_loss.inputs import LossInputs

# The optional tensors in the shape of logps; and all optional tensors that are checked alike.
PER_TOKEN = ("old_logps", "ref_logps", "loss_mask", "rollout_logps", "masked_logps", "entropy")
OPTIONAL = ("old_logps", "ref_logps", "loss_mask", "cu_seqlens", "rollout_logps", "masked_logps", "entropy")


def check_layout(inputs: LossInputs) -> None:
    """Check types, shapes, dtypes and devices."""
    logps, advantages, cu_seqlens, loss_mask = inputs.logps, inputs.advantages, inputs.cu_seqlens, inputs.loss_mask
    device, shape = logps.device, logps.shape
    require_device("advantages", advantages, device, "logps")
    for name in OPTIONAL:
        tensor = getattr(inputs, name)
        if tensor is not None:
            require_tensor(name, tensor)
            require_device(name, tensor, device, "logps")
    if not logps.is_floating_point():
        raise TypeError(f"logps must be floating point, got {logps.dtype}")
    if cu_seqlens is None:
        if logps.dim() != 2:
            raise ValueError(f"logps must be (B, T), or (N,) with cu_seqlens, got {tuple(shape)}")
    else:
        if loss_mask is not None:
            raise ValueError("loss_mask must be None with cu_seqlens: leave out the tokens that do not count, got a tensor")
        if logps.dim() != 1:
            raise ValueError(f"logps must be (N,) with cu_seqlens, got {tuple(shape)}")
        require_dtype("cu_seqlens", cu_seqlens, torch.int32)
        if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
            raise ValueError(f"cu_seqlens must be (S + 1,), from 0 to N, got {tuple(cu_seqlens.shape)}")
    sequences = (inputs.num_sequences,)
    if advantages.shape != sequences and advantages.shape != shape:
        raise ValueError(
            f"advantages must be one per sequence, {sequences}, or per token, {tuple(shape)}, got {tuple(advantages.shape)}"
        )
    if loss_mask is not None:
        require_dtype("loss_mask", loss_mask, torch.bool)
    for name in PER_TOKEN:
        tensor = getattr(inputs, name)
        if tensor is not None:
            require_shape(name, tensor, shape, "logps")
    for name in ("entropy_threshold", "num_items"):
        value = getattr(inputs, name)
        if isinstance(value, torch.Tensor):
            if value.dim() != 0:
                raise ValueError(f"{name} must be a number or a () tensor, got {tuple(value.shape)}")
            if name != "num_items" or value.device.type != "cpu":
                require_device(name, value, device, "logps")
        elif value is not None:
            require_number(name, value, "be a number or a () tensor")
            if not value >= 0:
                raise ValueError(f"{name} must be >= 0, got {value}")
    require_positive("accumulation_steps", inputs.accumulation_steps)


def check_config(inputs: LossInputs, config: GRPOLossConfig) -> None:
    """Check that the required inputs are given, and rollout_logps and masked_logps only if the configuration uses them."""
    for setting, name, needed in (
        ("beta", "ref_logps", config.beta > 0),
        ("rollout_correction", "rollout_logps", config.rollout_correction is not None),
        ("top_entropy_quantile", "entropy", config.top_entropy_quantile < 1),
        ("entropy_coef", "entropy", config.entropy_coef != 0),
    ):
        if needed and getattr(inputs, name) is None:
            raise ValueError(f"{name} must be given with {setting} = {getattr(config, setting)!r}, got None")
    unused = config.rollout_correction is None and config.off_policy_mask_threshold is None
    if unused and inputs.rollout_logps is not None:
        raise ValueError(
            "rollout_logps must be None unless config.rollout_correction or config.off_policy_mask_threshold uses it,"
            " got a tensor"
        )
    if config.perception and inputs.masked_logps is None:
        setting = next(name for name in PERCEPTION_WEIGHTS if getattr(config, name))
        raise ValueError(f"masked_logps must be given with {setting} = {getattr(config, setting)!r}, got None")
    if not config.perception and inputs.masked_logps is not None:
        raise ValueError(
            "masked_logps must be None unless config.perception_loss_weight, der_loss_weight1 or der_loss_weight2 is > 0,"
            " got a tensor"
        )


class _Widened(torch.autograd.Function):
    """Cast fp16 to a wider dtype. The gradient, which can be e^20 times a weight, is clamped to the range of fp16."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return x.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        greatest = torch.finfo(torch.float16).max
        return grad.clamp(-greatest, greatest).half(), None


def widened(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast ``x`` to ``dtype``, which is at least as wide."""
    if x.dtype == dtype:
        return x
    if x.dtype != torch.float16:
        return x.to(dtype)
    wide: torch.Tensor = _Widened.apply(x, dtype)
    return wide


def constant(x: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Cast ``x`` to ``dtype`` and detach it."""
    if x is None or (x.dtype == dtype and not x.requires_grad):
        return x
    return x.detach().to(dtype)


def prepare(inputs: LossInputs, config: GRPOLossConfig) -> LossInputs:
    """Cast the inputs to the dtype of computation, and detach those without a gradient. Unused inputs become None."""
    dtype = torch.promote_types(inputs.logps.dtype, torch.float32)

    def scalar(value: torch.Tensor | float | None, device: torch.device | str) -> torch.Tensor | None:
        if value is None or isinstance(value, torch.Tensor):
            return constant(value, dtype)
        return torch.full((), float(value), dtype=dtype, device=device)

    return LossInputs(
        logps=widened(inputs.logps, dtype),
        advantages=constant(inputs.advantages, dtype),  # type: ignore[arg-type]
        old_logps=constant(inputs.old_logps, dtype),
        ref_logps=constant(inputs.ref_logps, dtype) if config.beta else None,
        loss_mask=inputs.loss_mask,
        cu_seqlens=inputs.cu_seqlens,
        rollout_logps=constant(inputs.rollout_logps, dtype),
        masked_logps=None if inputs.masked_logps is None else widened(inputs.masked_logps, dtype),
        entropy=None if inputs.entropy is None else widened(inputs.entropy, dtype),
        entropy_threshold=scalar(inputs.entropy_threshold, inputs.logps.device) if config.top_entropy_quantile < 1 else None,
        num_items=scalar(inputs.num_items, "cpu"),
        accumulation_steps=float(inputs.accumulation_steps),
    )


def check_values(inputs: LossInputs) -> None:
    """Check that cu_seqlens increase from 0 to N. On a GPU nothing is checked, because this would wait for the device."""
    cu_seqlens = inputs.cu_seqlens
    if cu_seqlens is None or cu_seqlens.device.type != "cpu":
        return
    num, values = len(inputs.logps), cu_seqlens.tolist()
    if values[0] != 0 or values[-1] != num:
        raise ValueError(f"cu_seqlens must go from 0 to {num}, the tokens of logps, got {values}")
    if any(stop < start for start, stop in pairwise(values)):
        raise ValueError(f"cu_seqlens must not decrease, got {values}")
