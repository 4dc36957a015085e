"""Per-token losses in plain PyTorch, for ``triton_grpo_loss(reduce=False)``, whose caller may weight the tokens in any way.

The kernels of ``grpo_loss`` return the weighted sum, not the loss of each token. Tensors are (B, T). Gradients come from
autograd.
"""

import torch

from vlmkernels.ops.grpo_loss.config import MAX_LOG_RATIO, GRPOLossConfig


def bounded(log_ratio: torch.Tensor) -> torch.Tensor:
    """Clamp a log-ratio, so that the ratio times any advantage is finite in fp32."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def kl(ref_logps: torch.Tensor, logps: torch.Tensor) -> torch.Tensor:
    """Return the k3 estimator of KL(policy || reference). http://joschu.net/blog/kl-approx.html"""
    log_ratio = bounded(ref_logps - logps)
    return log_ratio.exp() - log_ratio - 1


def surrogate(
    config: GRPOLossConfig,
    logps: torch.Tensor,
    ratio: torch.Tensor,
    log_weight: torch.Tensor | None,
    advantages: torch.Tensor,
) -> torch.Tensor:
    """Return the policy term of each token. ``vlmkernels.ops.grpo_loss.config.LOSSES`` has the papers.

    Args:
        config: the objective.
        logps: the log-probabilities of the policy.
        ratio: the ratio of the policy to the old policy, differentiable.
        log_weight: (B, 1), the logarithm of the weight of each sequence, for vespo.
        advantages: (B, T) or (B, 1).
    """
    p, name = config.scalars, config.loss.surrogate
    if name == "ppo_clip":
        capped, clipped = ratio.clamp(max=p.delta), ratio.clamp(1 - p.epsilon_low, 1 + p.epsilon_high)
        return -torch.where(capped * advantages <= clipped * advantages, capped, clipped) * advantages
    if name == "cispo":
        return -ratio.detach().clamp(max=p.epsilon_high) * advantages * logps
    if name == "sapo":
        tau = torch.where(advantages > 0, p.sapo_temperature_pos, p.sapo_temperature_neg)
        return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages
    k = torch.where(advantages >= 0, p.vespo_k_pos, p.vespo_k_neg)
    lam = torch.where(advantages >= 0, p.vespo_lambda_pos, p.vespo_lambda_neg)
    phi = (lam + k * log_weight - lam * log_weight.exp()).clamp(max=MAX_LOG_RATIO).exp()
    return -phi * advantages * logps


def is_clipped(config: GRPOLossConfig, ratio: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Return 1 where clipping (not the cap ``delta``) makes a token's policy term constant, and 0 elsewhere."""
    p, name = config.scalars, config.loss.surrogate
    if name == "ppo_clip":
        low, high = (ratio < 1 - p.epsilon_low) & (advantages < 0), (ratio > 1 + p.epsilon_high) & (advantages > 0)
        return (low | high).to(ratio.dtype)
    if name == "cispo":
        return ((ratio > p.epsilon_high) & (advantages > 0)).to(ratio.dtype)
    return torch.zeros_like(ratio)
