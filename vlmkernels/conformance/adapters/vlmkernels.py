"""This package, on logits and log-probabilities."""

from typing import Any

import torch

from vlmkernels import gather_logps, group_advantages, grpo_loss, linear_grpo_loss, linear_logps
from vlmkernels.conformance import Adapter, AdvantageBatch, Documented, GRPOLossConfig, LossBatch, binary_logits
from vlmkernels.ops.grpo_loss.config import CORRECTIONS, KL_ESTIMATORS, LEVELS, LOSSES


def arguments(batch: LossBatch, config: GRPOLossConfig) -> dict[str, Any]:
    """Return the arguments that ``grpo_loss`` and ``linear_grpo_loss`` share."""
    names = ("old_logps", "ref_logps", "loss_mask", "rollout_logps", "accumulation_steps")
    shared = {name: getattr(batch, name) for name in names}
    return {**shared, "num_items": batch.tokens / batch.num_processes, "config": config}


class _Objective(Adapter):
    packages = ("vlmkernels",)
    loss_dtypes = (torch.float32, torch.float64)
    loss_types = tuple(LOSSES)
    levels = LEVELS
    kl_estimators = KL_ESTIMATORS
    corrections = CORRECTIONS
    options = {
        "delta": 4.0,
        "use_bias_correction_kl": True,
        "rollout_sequence_ratio": "mean",
        "rollout_clip_min": 0.75,
        "rollout_clip_max": 1.5,
        "off_policy_mask_threshold": 0.25,
        "top_entropy_quantile": 0.5,
        "entropy_coef": 0.25,
        "sapo_temperature_pos": 2.0,
        "sapo_temperature_neg": 0.5,
        "vespo_k_pos": 1.0,
        "vespo_lambda_pos": 1.5,
        "vespo_k_neg": 2.0,
        "vespo_lambda_neg": 1.0,
    }
    masks = ("padding", "holes", "nonfinite")
    documented = (
        Documented(
            ("loss/accumulation[bnpo*]", "loss/processes[bnpo*]"),
            "bnpo divides by the tokens of the call, as in TRL; dapo divides by those of the whole batch",
            "vlmkernels.grpo_loss, accumulation_steps",
        ),
    )


class Vlmkernels(_Objective):
    name = "vlmkernels"
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    scales = ("group", "batch", "none")
    baselines = ("mean", "leave_one_out", "pass_at_k", "none")
    unequal_groups = unscored = several_rewards = True

    def advantages(self, batch: AdvantageBatch) -> torch.Tensor:
        out = group_advantages(
            batch.rewards,
            group_sizes=batch.group_sizes,
            weights=batch.weights,
            scale=batch.scale,
            baseline=batch.baseline,
            eps=self.advantage_eps,
        )
        return out.advantages

    def loss(self, batch: LossBatch, config: GRPOLossConfig) -> torch.Tensor:
        return grpo_loss(batch.logps, batch.advantages, entropy=batch.entropy, **arguments(batch, config)).loss

    def logps_from_logits(self, logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
        return gather_logps(logits, targets, temperature=temperature)

    def logps_from_hidden(
        self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        return linear_logps(hidden, weight, targets, temperature=temperature)


class LinearLoss(_Objective):
    """The loss from hidden states and the output head, which computes log-probabilities and entropies itself."""

    name = "vlmkernels linear_grpo_loss"
    options = {name: value for name, value in _Objective.options.items() if "entropy" not in name}

    def loss(self, batch: LossBatch, config: GRPOLossConfig) -> torch.Tensor:
        hidden = binary_logits(batch.logps)
        targets = torch.zeros_like(batch.loss_mask, dtype=torch.int64)
        return linear_grpo_loss(hidden, torch.eye(2).to(hidden), targets, batch.advantages, **arguments(batch, config)).loss
