"""A chunk of ``linear_grpo_loss`` in plain PyTorch: the oracle of the fused row kernels."""

import torch

from vlmkernels.ops.grpo_loss.config import MIN_LOGP, GRPOLossConfig
from vlmkernels.ops.grpo_loss.reference import SURROGATES, bounded, combine
from vlmkernels.ops.linear_grpo_loss.tokens import Tokens
from vlmkernels.ops.linear_logps.reference import bwd, fwd, unsupported

__all__ = ["sweep", "unsupported"]


def token_gradient(logp, tokens: Tokens, config: GRPOLossConfig) -> torch.Tensor:
    """The derivative of the loss by each token's log-probability, where no token depends on another."""
    p = config.scalars
    read = lambda x, otherwise: otherwise if x is None else x.clamp(min=MIN_LOGP)  # noqa: E731
    logp = logp.clamp(min=MIN_LOGP)
    old, ref = read(tokens.old_logps, logp), read(tokens.ref_logps, logp)
    rollout = read(tokens.rollout_logps, old)
    ratio = bounded(logp - old).exp()
    weight = torch.ones_like(logp)
    if config.rollout_correction:
        gap = torch.where(rollout.isnan(), 0, old - rollout)
        correction = bounded(gap.clamp(p.rollout_log_min, p.rollout_log_max)).exp()
        if config.rollout_correction.endswith("mask"):
            correction = torch.where((gap >= p.rollout_log_min) & (gap <= p.rollout_log_max), correction, 0)
        weight = correction
    term = SURROGATES[config.loss.surrogate].term(logp, ratio, torch.zeros_like(logp), tokens.advantages, p)
    _, _, direct, through_ratio = combine(term, logp, ref, ratio, weight, config)
    return (direct + through_ratio) * tokens.share


def sweep(logits, hidden, tokens: Tokens, config: GRPOLossConfig, head, logp, entropy, out) -> None:
    """Write logp and entropy of each row, and over the logits the gradient of the loss by them; ``out`` has their memory."""
    stats = logp.new_empty(len(logp), 2)
    fwd(logits, hidden, tokens.targets, head, logp, entropy, stats)
    dlogp, dentropy = token_gradient(logp, tokens, config), torch.full_like(entropy, tokens.entropy_scale)
    bwd(logits, tokens.targets, dlogp, dentropy, logp, entropy, stats, head, out)
