"""The GRPO objective in plain PyTorch: the oracle of ``grpo_loss``."""

import torch

MAX_LOG_RATIO = 20.0  # e^20 times any advantage is finite in fp32


def ppo_clip(log_ratio, adv, config):
    """-min(r A, clip(r, 1 - eps_low, 1 + eps_high) A) with r = exp(log_ratio). https://arxiv.org/abs/1707.06347"""
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * adv, ratio.clamp(1 - config.epsilon_low, 1 + config.epsilon_high) * adv)


def per_sequence(mask, num_items):
    """m / (B max(|y|, 1)): the mean over tokens, then over completions."""
    return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)


def per_token(mask, num_items):
    """m / num_items: the mean over all tokens of the accumulated batch."""
    return mask / (mask.sum().clamp(min=1) if num_items is None else num_items)


LOSSES = {"grpo": (ppo_clip, per_sequence), "dapo": (ppo_clip, per_token)}


def k3(log_ratio):
    """The unbiased, non-negative estimator of KL(policy || reference). http://joschu.net/blog/kl-approx.html"""
    return log_ratio.exp() - log_ratio - 1


def grpo_loss(logps, advantages, old_logps, ref_logps, mask, entropy, num_items, config):
    surrogate, weighting = LOSSES[config.loss_type]
    logps = torch.where(mask, logps, 0)  # a value that is not asked for may be anything, NaN included
    log_ratio = torch.where(mask, logps - old_logps, 0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    loss = surrogate(log_ratio, advantages, config)
    mean = lambda x: torch.where(mask, x, 0).sum() / mask.sum().clamp(min=1)  # noqa: E731
    metrics = {}
    if config.beta:
        kl = k3(torch.where(mask, ref_logps - logps, 0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
        loss = loss + config.beta * kl
        metrics["kl"] = mean(kl.detach())
    ratio = log_ratio.detach().exp()
    low = (ratio < 1 - config.epsilon_low) & (advantages < 0)
    high = (ratio > 1 + config.epsilon_high) & (advantages > 0)
    for name, flag in (("low", low), ("high", high), ("region", low | high)):
        metrics[f"clip_ratio/{name}_mean"] = mean(flag.to(ratio.dtype))
    if entropy is not None:
        metrics["entropy"] = mean(entropy.detach())
    return (loss * weighting(mask.to(loss.dtype), num_items)).sum(), metrics
