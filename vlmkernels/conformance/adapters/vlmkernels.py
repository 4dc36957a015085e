"""This package, on logits and log-probabilities."""

import torch

from vlmkernels import gather_logps, group_advantages, grpo_loss, linear_logps
from vlmkernels.conformance import Adapter, AdvantageBatch


class Vlmkernels(Adapter):
    name = "vlmkernels"
    packages = ("vlmkernels",)
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    scales = ("group", "batch", "none")
    baselines = ("mean", "leave_one_out")
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

    def logps_from_logits(self, logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
        return gather_logps(logits, targets, temperature=temperature)

    def logps_from_hidden(
        self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        return linear_logps(hidden, weight, targets, temperature=temperature)
