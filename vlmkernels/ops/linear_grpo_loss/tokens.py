"""The inputs of the kernels of ``linear_grpo_loss``, besides the logits and the configuration."""

from typing import NamedTuple

import torch


class Tokens(NamedTuple):
    """One element per token in the loss mask, (N,), in the dtype of computation."""

    advantages: torch.Tensor
    share: torch.Tensor  # the weight of the token's loss
    old_logps: torch.Tensor | None
    ref_logps: torch.Tensor | None
    rollout_logps: torch.Tensor | None
    masked_logps: torch.Tensor | None
    entropy_scale: float  # the derivative of the loss by the entropy of a token

    def chunk(self, part: slice) -> "Tokens":
        """Return the tokens of ``part`` as views."""
        return Tokens._make(x[part] if isinstance(x, torch.Tensor) else x for x in self)

    def scaled(self, scale: float) -> "Tokens":
        """Return the tokens of ``scale`` times the loss."""
        return self._replace(share=self.share * scale, entropy_scale=self.entropy_scale * scale)
