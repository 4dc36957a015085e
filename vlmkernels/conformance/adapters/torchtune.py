"""torchtune: log-probabilities and the policy loss of PPO.

The package has no loss of GRPO: the recipe of GRPO imports torchtune.dev, which is not in it. Logits are in fp32, to which
the models of torchtune convert them.
"""

import torch

from vlmkernels.conformance import Adapter, GRPOLossConfig, LossBatch, NotApplicable
from vlmkernels.conformance.foreign import stand_ins

with stand_ins("torchao", "sentencepiece", "tiktoken"):
    from torchtune import rlhf
    from torchtune.rlhf.loss import PPOLoss


class Torchtune(Adapter):
    name = "torchtune (PPO)"
    packages = ("torchtune",)
    loss_types = ("bnpo",)  # the mean over the tokens of a micro-batch

    def loss(self, batch: LossBatch, config: GRPOLossConfig) -> torch.Tensor:
        if config.clip_high != config.epsilon_low:
            raise NotApplicable("both bounds are epsilon")
        if batch.num_processes > 1:
            raise NotApplicable("the recipe of PPO is for a single device")
        # As in recipes/ppo_full_finetune_single_device.py; values and returns of 0 give a value loss of 0.
        padding = ~batch.loss_mask
        logps = batch.logps.masked_fill(padding, 1.0)
        old = logps.detach() if batch.old_logps is None else batch.old_logps.masked_fill(padding, 1.0)
        advantages = batch.advantages.unsqueeze(1).expand_as(logps).masked_fill(padding, 0.0)
        nothing = torch.zeros_like(old)
        loss, *_ = PPOLoss(epsilon=config.epsilon_low)(
            old, logps, advantages, nothing, nothing, nothing, padding_masks=~padding, value_padding_masks=~padding
        )
        return loss / batch.accumulation_steps

    def logps_from_logits(self, logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
        return rlhf.logits_to_logprobs(logits, targets, temperature)
