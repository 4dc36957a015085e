"""Liger-Kernel 0.8: its GRPO losses, its log-probabilities from hidden states, and all of them with our patch.

Liger's caller splits the batch into micro-batches. As in a trainer of transformers, it divides a loss by the number of
micro-batches unless the loss is divided by the tokens of the whole batch (``num_items_in_batch``).
"""

from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import liger_kernel.chunked_loss
import liger_kernel.ops
import liger_kernel.transformers
import liger_kernel.transformers.grpo_loss
import torch
from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

from vlmkernels.conformance import Adapter, Documented, GRPOLossConfig, LossBatch, NotApplicable
from vlmkernels.conformance.synthetic import binary_logits, one_of
from vlmkernels.integrations.liger import patch_liger

WHOLE_BATCH = ("dapo", "cispo", "vespo")  # divided by num_items_in_batch
TRITON = "Liger's Triton kernels need a GPU"
# The fields of GRPOLossConfig that Liger's functions have under the same name, in both functions.
SAME = ("loss_type", "beta", "delta", "use_bias_correction_kl", "sapo_temperature_pos", "sapo_temperature_neg")
VESPO = ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")

OPTIONS = {
    "delta": 1.5,
    "use_bias_correction_kl": True,
    "sapo_temperature_pos": 2.0,
    "sapo_temperature_neg": 0.5,
    "vespo_k_pos": 1.0,
    "vespo_lambda_pos": 1.5,
    "vespo_k_neg": 2.0,
    "vespo_lambda_neg": 1.0,
}


def functions() -> SimpleNamespace:
    """Return what a program gets that imports Liger's functions now."""
    return SimpleNamespace(
        fused_linear=liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss,
        triton=liger_kernel.transformers.grpo_loss.triton_grpo_loss,
        scaled_cross_entropy=liger_kernel.ops.LigerFusedLinearScaledCrossEntropyFunction,
    )


LIGER = functions()
with patch_liger():
    PATCHED = functions()


def settings(config: GRPOLossConfig, low: str, high: str) -> dict[str, Any]:
    """Return the settings of Liger's losses; ``low`` and ``high`` are the names of the clip bounds."""
    if config.level == "sequence" and config.loss.surrogate != "ppo_clip":
        raise NotApplicable(f"Liger raises an error for {config.loss_type} with a ratio per sequence")
    return {
        **{name: getattr(config, name) for name in (*SAME, *VESPO)},
        **{low: config.epsilon_low, high: config.clip_high},
        "importance_sampling_level": config.level,
        "max_completion_length": config.max_completion_length,
    }


def rollout_ratio(batch: LossBatch, config: GRPOLossConfig) -> torch.Tensor | None:
    """Return the argument vllm_is_ratio, which Liger's caller computes: (B, T) or (B, 1)."""
    if config.rollout_correction is None:
        return None
    level, bound = config.rollout_correction.split("_")
    policy = batch.known_old_logps
    log_ratio = (policy - batch.rollout_logps).masked_fill(~batch.loss_mask, 0)
    if level == "sequence":
        total = log_ratio.sum(1, keepdim=True)
        count = batch.loss_mask.sum(1, keepdim=True).clamp(min=1)
        log_ratio = total / count if config.rollout_sequence_ratio == "mean" else total
    ratio = log_ratio.exp()
    clipped = ratio.clamp(config.rollout_clip_min or 0, config.rollout_clip_max)
    return clipped if bound == "truncate" else torch.where(ratio == clipped, ratio, 0)


def scaled(loss: torch.Tensor, batch: LossBatch, config: GRPOLossConfig) -> torch.Tensor:
    """Divide by the number of micro-batches, as Liger's caller does."""
    return loss if config.loss_type in WHOLE_BATCH else loss / batch.accumulation_steps


def moved(batch: LossBatch, device: str) -> LossBatch:
    """Return the batch on a device."""
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{name: x.to(device) for name, x in tensors.items() if isinstance(x, torch.Tensor)})


class _Liger(Adapter):
    packages = ("liger-kernel", "torch")
    loss_types = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
    levels = ("token", "sequence")
    kl_estimators = ("k3",)
    corrections = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    options = OPTIONS
    masks = ("padding", "holes")
    documented = (
        Documented(
            ("loss/accumulation[bnpo*]", "loss/processes[bnpo*]"),
            "bnpo divides by the tokens of the call, as in TRL",
            "TRL, GRPOConfig.loss_type; comment in liger_kernel/chunked_loss/grpo_loss.py: the losses match TRL's",
        ),
    )
    functions = LIGER


class LigerFusedLinear(_Liger):
    """``LigerFusedLinearGRPOLoss``: hidden states, output head and loss in one function of PyTorch."""

    name = "Liger fused linear GRPO"
    dtypes = (torch.float32, torch.bfloat16)

    def loss(self, batch: LossBatch, config: GRPOLossConfig) -> torch.Tensor:
        if batch.logps.isinf().any():
            raise NotApplicable("finite hidden states have no infinite log-probabilities")
        hidden = binary_logits(batch.logps)  # the head is the identity
        with one_of(batch.num_processes):
            objective = self.functions.fused_linear(
                compiled=False,
                use_ref_model=config.beta != 0,
                **settings(config, "epsilon_low", "epsilon_high"),
            )
            loss, _ = objective(
                hidden,
                torch.eye(2, dtype=hidden.dtype, device=hidden.device),
                torch.zeros_like(batch.loss_mask, dtype=torch.int64),
                batch.loss_mask.to(torch.int64),
                batch.advantages,
                ref_per_token_logps=batch.ref_logps,
                old_per_token_logps=batch.old_logps,
                vllm_is_ratio=rollout_ratio(batch, config),
                num_items_in_batch=batch.num_items,
            )
        return scaled(loss, batch, config)

    def logps_from_hidden(
        self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        return LigerFusedLinearPPOBase.chunk_forward(hidden, weight, targets, temperature=temperature)


class LigerTriton(_Liger):
    """``triton_grpo_loss``: logits and loss in Triton kernels."""

    name = "Liger triton_grpo_loss"
    needs_cuda: ClassVar = {"loss": TRITON}

    @property
    def device(self) -> str:  # type: ignore[override]
        return "cuda" if torch.cuda.is_available() else "cpu"

    def loss(self, batch: LossBatch, config: GRPOLossConfig) -> torch.Tensor:
        batch = moved(batch, self.device)
        if batch.logps.isposinf().any():
            raise NotApplicable("no logits have log-probabilities > 0")
        logits = torch.nn.functional.pad(binary_logits(batch.logps), (0, 0, 0, 1))  # the last position predicts nothing
        with one_of(batch.num_processes):
            loss, _ = self.functions.triton(
                logits,
                batch.old_logps,
                batch.ref_logps,
                torch.zeros_like(batch.loss_mask, dtype=torch.int64),
                batch.advantages,
                batch.loss_mask.to(torch.int64),
                temperature=1.0,
                inplace=False,
                reduce=True,
                vllm_is_ratio=rollout_ratio(batch, config),
                num_items_in_batch=batch.num_items,
                **settings(config, "eps_low", "eps_high"),
            )
        return scaled(loss, batch, config)


class LigerScaledCrossEntropy(_Liger):
    """``LigerFusedLinearScaledCrossEntropyFunction``. Its code for the CPU also runs on all GPUs but Hopper's."""

    name = "Liger fused linear scaled cross-entropy"
    dtypes = (torch.float32, torch.bfloat16)

    def logps_from_hidden(
        self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        function = self.functions.scaled_cross_entropy
        try:
            nll = function.apply(hidden.flatten(0, 1), weight, targets.flatten(), temperature)
        except ValueError as error:
            if targets.numel():
                raise
            raise NotApplicable(f"Liger raises an error for a batch without tokens: {error}") from error
        return -nll.view(targets.shape)


class LigerCrossEntropy(_Liger):
    """``LigerFusedLinearCrossEntropyLoss`` with ``reduction="none"``: Triton kernels."""

    name = "Liger fused linear cross-entropy"
    needs_cuda: ClassVar = {"logps_from_hidden": TRITON}
    device = LigerTriton.device

    def logps_from_hidden(
        self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        if temperature != 1:
            raise NotApplicable("Liger's fused linear cross-entropy has no temperature")
        function = liger_kernel.transformers.LigerFusedLinearCrossEntropyLoss(reduction="none")
        return -function(weight, hidden.flatten(0, 1), targets.flatten()).view(targets.shape)


class _Patched:
    """Liger as ``patch_liger`` of this package changes it."""

    packages = ("vlmkernels", "liger-kernel", "torch")
    needs_cuda: ClassVar = {}
    masks = ("padding", "holes", "nonfinite")
    functions = PATCHED


class PatchedFusedLinear(_Patched, LigerFusedLinear):
    name = "vlmkernels, patch of Liger fused linear GRPO"
    logps_from_hidden = Adapter.logps_from_hidden  # the patch has no function for it


class PatchedTriton(_Patched, LigerTriton):
    name = "vlmkernels, patch of Liger triton_grpo_loss"
    device = "cpu"


class PatchedScaledCrossEntropy(_Patched, LigerScaledCrossEntropy):
    name = "vlmkernels, patch of Liger fused linear scaled cross-entropy"
