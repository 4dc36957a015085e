"""``Objective``: converts Liger's GRPO arguments to ``grpo_loss``, and computes Liger's metrics and the loss per token."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from vlmkernels.integrations.liger import formulas
from vlmkernels.ops.grpo_loss.config import MAX_LOG_RATIO, VESPO_MIN_LOG_WEIGHT, GRPOLossConfig


class TokenLosses(NamedTuple):
    """The loss of each token (differentiable), its KL term or None, and whether it is clipped: (B, T), 0 outside the mask."""

    loss: torch.Tensor
    kl: torch.Tensor | None
    is_clipped: torch.Tensor


class Objective:
    """The objective of one call of Liger's functions.

    Args:
        config: the objective.
        advantages: (B,) or (B, T).
        mask: (B, T), 0 on the tokens that do not count.
        old_logps, ref_logps: (B, T) or None.
        policy_weight: Liger's ``vllm_is_ratio``: (B,), (B, 1), (B, T) or None, >= 0.
        num_items: Liger's ``num_items_in_batch``.

    Raises:
        ValueError: ``policy_weight`` has another shape.
    """

    def __init__(
        self,
        config: GRPOLossConfig,
        *,
        advantages: torch.Tensor,
        mask: torch.Tensor,
        old_logps: torch.Tensor | None,
        ref_logps: torch.Tensor | None,
        policy_weight: torch.Tensor | None,
        num_items: torch.Tensor | float | None,
    ) -> None:
        self.config = config
        self.loss_mask = mask != 0
        self.old_logps, self.ref_logps = old_logps, ref_logps
        self.advantages = advantages if advantages.dim() == 2 else advantages.unsqueeze(1)
        self.num_items = _items_per_process(self.loss_mask, num_items)
        self.policy_weight = None
        if policy_weight is not None:
            shapes = ((len(mask),), (len(mask), 1), tuple(mask.shape))
            if tuple(policy_weight.shape) not in shapes:
                got = tuple(policy_weight.shape)
                raise ValueError(f"vllm_is_ratio must be (B,), (B, 1) or (B, L), one of {shapes}, got {got}")
            weight = policy_weight.reshape(len(mask), -1)
            self.policy_weight = weight if weight.shape[1] == 1 else torch.where(self.loss_mask, weight, 1)

    def arguments(self, logps: torch.Tensor | None = None) -> dict[str, Any]:
        """Return the keyword arguments of ``grpo_loss``.

        Args:
            logps: (B, T), needed only for vespo with a policy weight.
        """
        config, advantages = self.config, self.advantages
        rollout_logps = None
        if self.policy_weight is not None and config.loss_type == "vespo":
            # The sequence weight is a product over tokens of ratios to the sampler. These rollout_logps add the policy weight.
            rollout_logps = (logps.detach() if self.old_logps is None else self.old_logps) - self._log_policy_weight()
            config = config.replace(rollout_correction="token_truncate", rollout_clip_max=None)
        elif self.policy_weight is not None:
            # Policy terms are homogeneous in the advantage, so a weight >= 0 can multiply the advantage instead.
            advantages = advantages * self.policy_weight
        return {
            "advantages": advantages.squeeze(1) if advantages.shape[1] == 1 else advantages,
            "old_logps": self.old_logps,
            "ref_logps": self.ref_logps,
            "loss_mask": self.loss_mask,
            "rollout_logps": rollout_logps,
            "num_items": self.num_items,
            "config": config,
        }

    def metrics(self, logps: torch.Tensor, kl: torch.Tensor | None) -> list[torch.Tensor]:
        """Return Liger's metrics: the mean KL term, if there is one, and the share of tokens that are clipped."""
        clipped = formulas.is_clipped(self.config, self._ratio(logps.detach()), self.advantages)
        clip_ratio = torch.where(self.loss_mask, clipped, 0).sum() / self.loss_mask.sum().clamp(min=1)
        return [clip_ratio] if kl is None else [kl, clip_ratio]

    def token_losses(self, logps: torch.Tensor) -> TokenLosses:
        """Return the loss of each token before aggregation."""
        config, ratio = self.config, self._ratio(logps)
        advantages = torch.where(self.loss_mask, self.advantages, 0)
        log_weight = self._sequence_log_weight(ratio) if config.loss_type == "vespo" else None
        loss = formulas.surrogate(config, logps, ratio, log_weight, advantages)
        if self.policy_weight is not None and config.loss_type != "vespo":
            loss = loss * self.policy_weight
        kl = None
        if config.beta:
            kl = formulas.kl(torch.where(self.loss_mask, self.ref_logps, 0), logps)
            kl = kl * ratio if config.use_bias_correction_kl else kl
            loss = loss + config.beta * kl
            kl = torch.where(self.loss_mask, kl.detach(), 0)
        clipped = formulas.is_clipped(config, ratio.detach(), self.advantages)
        return TokenLosses(torch.where(self.loss_mask, loss, 0), kl, torch.where(self.loss_mask, clipped, 0))

    def _ratio(self, logps: torch.Tensor) -> torch.Tensor:
        """Return the ratio (B, T) of the policy to the old policy, per token or per sequence; differentiable."""
        log_ratio = logps - (logps.detach() if self.old_logps is None else self.old_logps)
        log_ratio = torch.where(self.loss_mask, log_ratio, 0)
        if self.config.level == "sequence":
            length = self.loss_mask.sum(1, keepdim=True).clamp(min=1)
            log_ratio = (log_ratio.sum(1, keepdim=True) / length).expand_as(logps)
        return formulas.bounded(log_ratio).exp()

    def _log_policy_weight(self) -> torch.Tensor:
        """Return the logarithm of the policy weight per token, (B, T) or (B, 1). Tokens share a sequence's weight equally."""
        log_weight = self.policy_weight.log()
        return log_weight / self.loss_mask.sum(1, keepdim=True).clamp(min=1) if log_weight.shape[1] == 1 else log_weight

    def _sequence_log_weight(self, ratio: torch.Tensor) -> torch.Tensor:
        """Return the logarithm of vespo's weight of each sequence, (B, 1)."""
        log_weight = ratio.detach().log()
        if self.policy_weight is not None:
            log_weight = log_weight + self._log_policy_weight().clamp(min=VESPO_MIN_LOG_WEIGHT)
        total = torch.where(self.loss_mask, log_weight, 0).sum(1, keepdim=True)
        return total.clamp(VESPO_MIN_LOG_WEIGHT, MAX_LOG_RATIO)


def _items_per_process(loss_mask: torch.Tensor, num_items: torch.Tensor | float | None) -> torch.Tensor | float | None:
    """Return the divisor of dapo, cispo and vespo: the tokens of all processes (given or counted) / number of processes."""
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if num_items is None:
        if processes == 1:
            return None
        num_items = loss_mask.sum().float()
        dist.all_reduce(num_items)
    if isinstance(num_items, torch.Tensor):
        return (num_items.to(loss_mask.device, torch.float32) / processes).clamp(min=1)
    return max(num_items / processes, 1.0)
