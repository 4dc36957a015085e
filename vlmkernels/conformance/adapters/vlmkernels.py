"""This package, on logits and log-probabilities."""

import torch

from vlmkernels import gather_logps, group_advantages, grpo_loss, linear_logps
from vlmkernels.conformance import Adapter, AdvantageBatch


class Vlmkernels(Adapter):
    name = "vlmkernels"
    packages = ("vlmkernels",)
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
