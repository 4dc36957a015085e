"""The GRPO objective in plain PyTorch: the oracle of ``grpo_loss``.

Let r be the ratio, c the weight of a token after masks and corrections, and w its weight in the aggregation. Then
    loss = sum_t w_t (c_t surrogate(r_t, A_t) + beta kl_t [r_t] + perception_t) / divisor - entropy_coef mean(entropy)
where the factor [r_t] is present with use_bias_correction_kl, and ``perception`` computes perception_t, the terms of PAPO.
The logarithm of a ratio per sequence is the mean of the log-ratios of its tokens, so the gradients through this ratio are added
and spread evenly over the tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from vlmkernels.ops.grpo_loss.config import MAX_LOG_RATIO, MAX_PERCEPTION_KL, MIN_LOGP, VESPO_MIN_LOG_WEIGHT, GRPOLossConfig
from vlmkernels.ops.grpo_loss.inputs import STATS, LossInputs, Sequences, token_weights


def unsupported(*tensors: torch.Tensor) -> str | None:
    return None


class Term(NamedTuple):
    """The loss of each token, its derivative by logp, and two statistics, whose metrics ``config.Loss`` names."""

    loss: torch.Tensor
    dlogp: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor


def chosen_by(condition: torch.Tensor, yes: float, no: float, like: torch.Tensor) -> torch.Tensor:
    """Return one of two numbers per token, in the dtype of ``like``: torch.where of two Python numbers rounds them to fp32."""
    return torch.full_like(like, yes).where(condition, no)


def ppo_clip(logp, ratio, log_weight, adv, p) -> Term:
    """-min(min(r, delta) A, clip(r, 1 - eps_low, 1 + eps_high) A). https://arxiv.org/abs/1707.06347, delta: 2505.07291"""
    capped, clipped = ratio.clamp(max=p.delta), ratio.clamp(1 - p.epsilon_low, 1 + p.epsilon_high)
    first = capped * adv <= clipped * adv
    chosen = torch.where(first, capped, clipped)
    low, high = (capped < 1 - p.epsilon_low) & (adv < 0), (capped > 1 + p.epsilon_high) & (adv > 0)
    constant = (chosen < ratio) | (chosen > ratio)  # not "!=": a NaN shows in the gradient too
    return Term(-chosen * adv, torch.where(constant, 0, -ratio * adv), low.to(adv.dtype), high.to(adv.dtype))


def cispo(logp, ratio, log_weight, adv, p) -> Term:
    """-sg(min(r, eps_high)) A logp. https://arxiv.org/abs/2506.13585"""
    weight = ratio.clamp(max=p.epsilon_high)
    high = (ratio > p.epsilon_high) & (adv > 0)
    return Term(-weight * adv * logp, -weight * adv, torch.zeros_like(adv), high.to(adv.dtype))


def sapo(logp, ratio, log_weight, adv, p) -> Term:
    """-sigmoid(tau (r - 1)) 4 / tau A, tau by the sign of A. https://arxiv.org/abs/2511.20347"""
    tau = chosen_by(adv > 0, p.sapo_temperature_pos, p.sapo_temperature_neg, adv)
    gate = torch.sigmoid(tau * (ratio - 1))
    nothing = torch.zeros_like(adv)
    return Term(-gate * 4 / tau * adv, -4 * gate * (1 - gate) * ratio * adv, nothing, nothing)


def vespo(logp, ratio, log_weight, adv, p) -> Term:
    """-sg(phi(w)) A logp, phi(w) = e^lambda w^k e^(-lambda w), w the weight of the sequence. https://arxiv.org/abs/2602.10693"""
    k = chosen_by(adv >= 0, p.vespo_k_pos, p.vespo_k_neg, adv)
    lam = chosen_by(adv >= 0, p.vespo_lambda_pos, p.vespo_lambda_neg, adv)
    phi = (lam + k * log_weight - lam * log_weight.exp()).clamp(max=MAX_LOG_RATIO).exp()
    return Term(-phi * adv * logp, -phi * adv, torch.zeros_like(adv), phi)


class Surrogate(NamedTuple):
    term: Callable[..., Term]
    through_ratio: bool  # dlogp is through the ratio: with a ratio per sequence it is spread over the tokens


SURROGATES = {
    "ppo_clip": Surrogate(ppo_clip, through_ratio=True),
    "cispo": Surrogate(cispo, through_ratio=False),
    "sapo": Surrogate(sapo, through_ratio=True),
    "vespo": Surrogate(vespo, through_ratio=False),
}

# x = ref_logp - logp -> an estimator of KL(policy || reference), and its derivative by logp. http://joschu.net/blog/kl-approx.html
KL = {
    "none": lambda x: (torch.zeros_like(x), torch.zeros_like(x)),
    "k1": lambda x: (-x, torch.ones_like(x)),
    "k2": lambda x: (x.square() / 2, -x),
    "k3": lambda x: (x.exp() - x - 1, 1 - x.exp()),
}


def bounded(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


class Perception(NamedTuple):
    """PAPO's terms of each token, their derivatives, and statistics."""

    loss: torch.Tensor
    dlogp: torch.Tensor
    dmasked: torch.Tensor
    kl: torch.Tensor
    entropy: torch.Tensor
    clipped: torch.Tensor
    seen: torch.Tensor  # 1 where the token has masked images; where it has none everything is 0


def perception(logp, masked, config) -> Perception:
    """-gamma min(k3, 10) - eta1 logp - eta2 masked, with k3 = e^x - x - 1 and x = masked - logp. https://arxiv.org/abs/2507.06448

    k3 estimates KL(policy || policy given masked images) from tokens of the policy. The paper prints -x for x, with which it
    would not. The code of its authors has this x, and this bound, beyond which the estimate has no gradient.
    """
    seen = ~masked.isnan()
    masked = torch.where(seen, masked, logp)
    kl, dkl = KL["k3"](bounded(masked - logp))
    clipped = kl > MAX_PERCEPTION_KL
    dkl = config.perception_loss_weight * torch.where(clipped, 0, dkl)
    kl = kl.clamp(max=MAX_PERCEPTION_KL)
    loss = -config.perception_loss_weight * kl - config.der_loss_weight1 * logp - config.der_loss_weight2 * masked
    terms = loss, -dkl - config.der_loss_weight1, dkl - config.der_loss_weight2, kl, -masked, clipped, seen
    return Perception(*(torch.where(seen, x, 0).to(logp.dtype) for x in terms))


def rollout_log_weight(log_ratio, sequences, length, p, config):
    """Return the logarithm of the weight that corrects for the sampling policy, truncated or masked, (N,)."""
    level, bound = config.rollout_correction.split("_")
    if level == "sequence":
        total = sequences.total(log_ratio)
        log_ratio = sequences.per_token(total / length if config.rollout_sequence_ratio == "mean" else total)
    inside = (log_ratio >= p.rollout_log_min) & (log_ratio <= p.rollout_log_max)
    log_weight = bounded(log_ratio.clamp(p.rollout_log_min, p.rollout_log_max))
    return log_weight if bound == "truncate" else torch.where(inside, log_weight, -torch.inf)


def combine(term, logp, ref, ratio, weight, config):
    """Return, for each token, the loss, the KL term, and the derivatives of the loss by logp directly and through the ratio."""
    kl, dkl = KL[config.kl](bounded(ref - logp))
    direct, through_ratio = config.beta * dkl, torch.zeros_like(kl)
    if config.use_bias_correction_kl:
        kl, direct, through_ratio = kl * ratio, direct * ratio, config.beta * kl * ratio
    if SURROGATES[config.loss.surrogate].through_ratio:
        through_ratio = through_ratio + weight * term.dlogp
    else:
        direct = direct + weight * term.dlogp
    return weight * term.loss + config.beta * kl, kl, direct, through_ratio


def fwd(inputs: LossInputs, config: GRPOLossConfig, loss, dlogp, dentropy, dmasked, stats) -> None:
    """Write the loss, its derivatives by logp, entropy and masked_logp (without the scales) and the statistics."""
    p, surrogate, sequences = config.scalars, SURROGATES[config.loss.surrogate], Sequences(inputs)
    mask = torch.ones_like(inputs.logps, dtype=torch.bool) if inputs.loss_mask is None else inputs.loss_mask
    mask = mask.flatten()
    m = mask.to(stats.dtype)
    length = sequences.total(m).clamp(min=1)

    def read(x: torch.Tensor) -> torch.Tensor:
        """Return the values where the loss mask is true, and 0 elsewhere, where they may be NaN."""
        return torch.where(mask, x.flatten(), 0)

    logp = read(inputs.logps).clamp(min=MIN_LOGP)
    old = logp if inputs.old_logps is None else read(inputs.old_logps).clamp(min=MIN_LOGP)
    adv = read(inputs.advantages if inputs.per_token else sequences.per_token(inputs.advantages))

    # The ratio of the policy to the policy before this step.
    log_ratio = logp - old
    if config.level == "sequence":
        sequence_ratio = bounded(sequences.total(log_ratio) / length).exp()
        ratio = sequences.per_token(sequence_ratio)
    else:
        sequence_ratio = torch.ones_like(length)
        ratio = bounded(log_ratio).exp()

    # The factors of a token's policy term.
    kept = m if inputs.entropy_threshold is None else m * ~(read(inputs.entropy) < inputs.entropy_threshold)
    weight = kept
    log_rollout = torch.zeros_like(logp)
    sampling = old
    if inputs.rollout_logps is not None:
        # A token without a log-probability of its sampler counts as sampled by the policy before this step.
        scored = ~read(inputs.rollout_logps).isnan()
        rollout = torch.where(scored, read(inputs.rollout_logps).clamp(min=MIN_LOGP), old)
        sampling = torch.where(scored, rollout, logp)
        if config.rollout_correction:
            log_rollout = rollout_log_weight(old - rollout, sequences, length, p, config)
    if config.loss.surrogate != "vespo":
        weight = weight * log_rollout.exp()
    if config.off_policy_mask_threshold is not None:
        drift = sequences.per_token(sequences.total(sampling - logp) / length)
        weight = weight * ((adv >= 0) | (drift <= p.off_policy_threshold))

    # Vespo's weight of a sequence: the product of its tokens' ratios and corrections.
    log_weights = bounded(log_ratio) + m * log_rollout.clamp(min=VESPO_MIN_LOG_WEIGHT)
    log_weight = sequences.total(log_weights).clamp(VESPO_MIN_LOG_WEIGHT, MAX_LOG_RATIO)

    term = surrogate.term(logp, ratio, sequences.per_token(log_weight), adv, p)
    ref = read(inputs.ref_logps).clamp(min=MIN_LOGP) if config.beta else logp
    value, kl, direct, through_ratio = combine(term, logp, ref, ratio, weight, config)
    # Without masked images the terms of PAPO are 0.
    masked = torch.full_like(logp, torch.nan) if inputs.masked_logps is None else read(inputs.masked_logps).clamp(min=MIN_LOGP)
    seen = perception(logp, masked, config)
    value, direct = value + seen.loss, direct + seen.dlogp
    if config.level == "sequence":
        through_ratio = sequences.per_token(sequences.total(m * through_ratio) / length)

    share, policy_scale = token_weights(inputs, config, sequences)
    entropy_scale = -config.entropy_coef / (kept.sum().clamp(min=1) * inputs.accumulation_steps)
    policy_loss = (share * value).sum() * policy_scale
    entropy = torch.zeros_like(logp) if inputs.entropy is None else read(inputs.entropy)
    loss.copy_(policy_loss + (entropy_scale * (kept * entropy).sum() if config.entropy_coef else 0))
    dlogp.copy_((share * (direct + through_ratio)).view(dlogp.shape))
    if dentropy.numel():
        dentropy.copy_(kept.view(dentropy.shape))
    if dmasked.numel():
        dmasked.copy_((share * seen.dmasked).view(dmasked.shape))

    # If ratio and advantage are per sequence, its statistics count once, not once per token.
    per_sequence = (config.level == "sequence" or config.loss.surrogate == "vespo") and not inputs.per_token
    if per_sequence:
        nothing = torch.zeros_like(length)
        term = surrogate.term(nothing, sequence_ratio, log_weight, inputs.advantages, p)
        low, high, units = term.low, term.high, torch.ones_like(length)
    else:
        low, high, units = sequences.total(m * term.low), sequences.total(m * term.high), sequences.total(m)
    counted = units > 0

    def mean(x: torch.Tensor, over: torch.Tensor = m) -> torch.Tensor:
        return (over * x).sum() / over.sum().clamp(min=1)

    with_images = m * seen.seen

    values = {
        "policy_scale": policy_scale,
        "entropy_scale": entropy_scale,
        "policy_loss": policy_loss,
        "kl": mean(kl),
        "entropy": mean(entropy),
        "low_mean": low.sum() / units.sum().clamp(min=1),
        "low_min": -greatest(-low / units.clamp(min=1), counted),
        "high_mean": high.sum() / units.sum().clamp(min=1),
        "high_max": greatest(high / units.clamp(min=1), counted),
        "ratio_mean": mean(ratio),
        "ratio_min": -greatest(-ratio, mask),
        "ratio_max": greatest(ratio, mask),
        "tokens": m.sum(),
        "effective_tokens": (m * (weight != 0)).sum(),
        "rollout_mean": mean(log_rollout.exp()),
        "masked_kl": mean(seen.kl, with_images),
        "masked_entropy": mean(seen.entropy, with_images),
        "masked_clipped": mean(seen.clipped, with_images),
        "masked_tokens": with_images.sum(),
    }
    values["region_mean"] = values["low_mean"] + values["high_mean"]  # a token is clipped at one bound at most
    stats.copy_(torch.stack([values[name] for name in STATS[: len(stats)]]))


def greatest(x: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Return the maximum of ``x`` where ``where`` is true; 0 if it is true nowhere."""
    chosen = torch.cat([torch.where(where, x, -torch.inf), x.new_full((1,), -torch.inf)]).max()
    return torch.where(chosen == -torch.inf, 0, chosen)
