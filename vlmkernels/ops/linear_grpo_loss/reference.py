"""A chunk of ``linear_grpo_loss`` in plain PyTorch: the oracle of the fused kernels."""

import torch

from vlmkernels.ops.grpo_loss.config import MIN_LOGP, GRPOLossConfig
from vlmkernels.ops.grpo_loss.reference import SURROGATES, bounded, combine, perception
from vlmkernels.ops.linear_grpo_loss.tokens import Tokens
from vlmkernels.ops.linear_logps.inputs import SelectedRows
from vlmkernels.ops.linear_logps.reference import bwd, fwd, unsupported

__all__ = ["sweep", "unsupported"]


def token_gradient(logp: torch.Tensor, tokens: Tokens, config: GRPOLossConfig) -> torch.Tensor:
    """Return the derivative of the loss by each token's log-probability, for objectives whose tokens are independent."""

    def read(x: torch.Tensor | None, otherwise: torch.Tensor) -> torch.Tensor:
        return otherwise if x is None else x.clamp(min=MIN_LOGP)

    p = config.scalars
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
    if tokens.masked_logps is not None:
        direct = direct + perception(logp, tokens.masked_logps.clamp(min=MIN_LOGP), config).dlogp
    return (direct + through_ratio) * tokens.share


def sweep(logits, hidden, selected: SelectedRows, tokens: Tokens, config: GRPOLossConfig, head, out) -> None:
    """Write logp, entropy and stats of each row, and the gradient of the logits to ``out``, which may share their memory."""
    fwd(logits, hidden, selected, head)
    dlogp = token_gradient(selected.logp, tokens, config)
    dentropy = torch.full_like(selected.entropy, tokens.entropy_scale)
    bwd(logits, selected._replace(dlogp=dlogp, dentropy=dentropy), head, out)
