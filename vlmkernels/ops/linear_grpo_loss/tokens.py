"""What the rows of ``linear_grpo_loss`` take, beside the logits and the configuration."""

from typing import NamedTuple

import torch


class Tokens(NamedTuple):
    """Of N tokens that count, (N,) each, in the dtype of computation but for the first."""

    targets: torch.Tensor  # int64
    advantages: torch.Tensor
    share: torch.Tensor  # what the token's loss is multiplied by
    old_logps: torch.Tensor | None
    ref_logps: torch.Tensor | None
    rollout_logps: torch.Tensor | None
    entropy_scale: float  # the derivative of the loss by the entropy of a token

    def cut(self, chunk: slice) -> "Tokens":
        return Tokens(*[x[chunk] if isinstance(x, torch.Tensor) else x for x in self])
