"""This package, on logits and log-probabilities."""

import torch

from vlmkernels import gather_logps, group_advantages, grpo_loss, linear_logps
from vlmkernels.conformance import Adapter, AdvantageBatch, Documented, GRPOLossConfig, LossBatch
from vlmkernels.ops.grpo_loss.config import CORRECTIONS, KL_ESTIMATORS, LEVELS, LOSSES


class Vlmkernels(Adapter):
    name = "vlmkernels"
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
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    scales = ("group", "batch", "none")
    baselines = ("mean", "leave_one_out", "pass_at_k", "none")
    unequal_groups = unscored = several_rewards = True
    documented = (
        Documented(
            "loss/accumulation[bnpo*]",
            "bnpo divides by the tokens of the call, as in TRL; dapo divides by those of the whole batch",
            "vlmkernels/ops/grpo_loss/__init__.py, accumulation_steps",
        ),
        Documented(
            "loss/processes[bnpo*]",
            "bnpo divides by the tokens of the call, as in TRL; dapo divides by those of the whole batch",
            "vlmkernels/ops/grpo_loss/__init__.py, accumulation_steps",
        ),
    )

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
        out = grpo_loss(
            batch.logps,
            batch.advantages,
            old_logps=batch.old_logps,
            ref_logps=batch.ref_logps,
            loss_mask=batch.loss_mask,
            rollout_logps=batch.rollout_logps,
            entropy=batch.entropy,
            num_items=batch.tokens / batch.num_processes,
            accumulation_steps=batch.accumulation_steps,
            config=config,
        )
        return out.loss

    def logps_from_logits(self, logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
        return gather_logps(logits, targets, temperature=temperature)

    def logps_from_hidden(
        self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        return linear_logps(hidden, weight, targets, temperature=temperature)
