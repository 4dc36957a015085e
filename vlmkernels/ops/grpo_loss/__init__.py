"""The GRPO objective on given log-probabilities."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from vlmkernels.ops.checks import require, require_shape
from vlmkernels.ops.grpo_loss import reference


@dataclass(frozen=True)
class GRPOLossConfig:
    """What defines the objective. The field names and meanings are TRL's (``trl.GRPOConfig``).

    Args:
        loss_type: a row of ``reference.LOSSES``: "grpo" averages over each completion and then over completions, "dapo" over
            all tokens of the accumulated batch.
        beta: weight of the KL term (k3) against ``ref_logps``; >= 0.
        epsilon_low, epsilon_high: the ratio is clipped to [1 - epsilon_low, 1 + epsilon_high].
    """

    loss_type: str = "dapo"
    beta: float = 0.0
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2

    def __post_init__(self) -> None:
        require(
            self.loss_type in reference.LOSSES, "loss_type", f"be one of {', '.join(reference.LOSSES)}", repr(self.loss_type)
        )
        require(self.beta >= 0, "beta", "be >= 0", self.beta)
        require(0 <= self.epsilon_low <= 1, "epsilon_low", "be in [0, 1]", self.epsilon_low)
        require(self.epsilon_high >= 0, "epsilon_high", "be >= 0", self.epsilon_high)


class GRPOLossOutput(NamedTuple):
    """The scalar loss, differentiable, and detached scalar metrics: kl (with beta > 0), clip_ratio/low_mean,
    clip_ratio/high_mean, clip_ratio/region_mean, entropy (where given)."""

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


def grpo_loss(
    logps: torch.Tensor,
    advantages: torch.Tensor,
    *,
    old_logps: torch.Tensor | None = None,
    ref_logps: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    num_items: torch.Tensor | float | None = None,
    config: GRPOLossConfig = GRPOLossConfig(),
) -> GRPOLossOutput:
    """Clipped policy-gradient loss over the completion tokens of a batch.

    Equivalent to::

        ratio = (logps - old_logps).exp()
        clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
        loss = -torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])
        loss = loss + beta * ((ref_logps - logps).exp() - (ref_logps - logps) - 1)
        loss = (loss * mask).sum() / num_items                                           # dapo

    Args:
        logps: (B, T), the policy's log-probabilities. A gradient goes to them alone.
        advantages: (B,), or (B, T) per token.
        old_logps: (B, T), of the policy that sampled; None = on policy, the ratio is 1.
        ref_logps: (B, T), of the reference model; needed when beta > 0.
        mask: (B, T) bool, true on completion tokens; default all.
        entropy: (B, T), for the metric.
        num_items: the completion tokens of the whole accumulated batch, over all processes, divided by the number of
            processes; default those of ``mask``. Used by "dapo".
        config: see ``GRPOLossConfig``.

    Raises:
        ValueError: a shape is wrong, or ref_logps is missing with beta > 0.

    Source: https://arxiv.org/abs/2402.03300 (grpo), https://arxiv.org/abs/2503.14476 (dapo).
    """
    require(logps.dim() == 2, "logps", "be (B, T)", tuple(logps.shape))
    if advantages.dim() == 1:
        require_shape("advantages", advantages, logps.shape[:1], "the rows of logps")
    else:
        require_shape("advantages", advantages, logps.shape, "logps")
    for name, tensor in (("old_logps", old_logps), ("ref_logps", ref_logps), ("mask", mask), ("entropy", entropy)):
        if tensor is not None:
            require_shape(name, tensor, logps.shape, "logps")
    require(config.beta == 0 or ref_logps is not None, "ref_logps", f"be given with beta = {config.beta}", None)
    mask = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask
    advantages = advantages if advantages.dim() == 2 else advantages.unsqueeze(1)
    old_logps = logps.detach() if old_logps is None else old_logps
    return GRPOLossOutput(*reference.grpo_loss(logps, advantages, old_logps, ref_logps, mask, entropy, num_items, config))
