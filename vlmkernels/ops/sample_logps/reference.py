"""Sampling from filtered logits in plain PyTorch: the oracle of ``sample_logps``.

With x the logits, z = x / temperature and p = softmax(z):  logp = log p[id],  H = -sum_v p_v log p_v.
The scores s are x with the repetition penalty (https://arxiv.org/abs/1909.05858) and -inf for banned tokens. top_k, top_p
(https://arxiv.org/abs/1904.09751) and min_p (https://arxiv.org/abs/2407.01082) leave a set K, in this order. The token is the
first with  sum_{v <= id} q_v > u,  where q is the softmax of s / temperature over K.
"""

import torch

from vlmkernels.ops.sample_logps.inputs import Filters, Inputs, SampledTokens

# A token with less than this share of the greatest probability is not sampled; in fp32 its probability is 0.
LEAST = 2.0**-126


def unsupported(logits: torch.Tensor) -> str | None:
    return None


def allowed_scores(inputs: Inputs, x: torch.Tensor, penalty: float) -> torch.Tensor:
    """Return x with the repetition penalty applied, and -inf for banned tokens."""
    if inputs.seen is not None:
        x = torch.where(inputs.seen, torch.where(x < 0, x * penalty, x / penalty), x)
    if inputs.banned is not None:
        banned = inputs.banned[:1] if inputs.banned_rows is None else inputs.banned[inputs.banned_rows]
        x = x.masked_fill(banned, -torch.inf)
    return x


def probabilities(scores: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the softmax relative to its greatest element, in fp64."""
    top = scores.amax(1, keepdim=True)
    z = (scores - top) / temperature
    weights = z.exp().double().masked_fill(scores == -torch.inf, 0)
    return weights.masked_fill(weights < LEAST, 0)


def filtered(scores: torch.Tensor, filters: Filters) -> torch.Tensor:
    """Return scores with -inf for the tokens that top_k, top_p and min_p remove."""
    if filters.top_k:
        kth = scores.topk(min(filters.top_k, scores.shape[1])).values[:, -1:]
        scores = scores.masked_fill(scores < kth, -torch.inf)
    if filters.removable > 0:
        # Of equal scores, those of the greatest ids are removed.
        ascending, order = (x.flip(1) for x in scores.sort(dim=1, descending=True, stable=True))
        sums = probabilities(ascending, filters.temperature).cumsum(1)
        remove = sums <= filters.removable * sums[:, -1:]
        remove[:, -1] = False
        scores = scores.masked_fill(torch.empty_like(remove).scatter_(1, order, remove), -torch.inf)
    if filters.min_p:
        least = scores.amax(1, keepdim=True) + torch.tensor(filters.min_p_distance, dtype=scores.dtype)
        scores = scores.masked_fill(scores < least, -torch.inf)
    return scores


def fwd(inputs: Inputs, filters: Filters, outputs: SampledTokens) -> None:
    """Write the results."""
    wide = torch.promote_types(inputs.logits.dtype, torch.float32)
    x = inputs.logits.to(wide)
    temperature = filters.temperature
    invalid = (x.isnan() | x.isposinf()).any(1)
    scores = allowed_scores(inputs, x, filters.repetition_penalty)
    empty = ~invalid & scores.isneginf().all(1)
    failed = invalid | empty
    scores = scores.masked_fill(failed.unsqueeze(1), 0)
    log_p = (x.masked_fill(invalid.unsqueeze(1), 0) / temperature).log_softmax(1)
    if inputs.uniform is None:
        ids = scores.argmax(1)
    else:
        scores = filtered(scores, filters)
        sums = probabilities(scores, temperature).cumsum(1)
        total = sums[:, -1:]
        uniform = inputs.uniform.clamp(0, 1 - 2**-53).nan_to_num(0)
        below = torch.minimum(uniform.unsqueeze(1) * total, total.nextafter(total - 1))
        # A token of probability 0 has the sum of the token before it, so it is never the first with a greater sum.
        ids = torch.searchsorted(sums, below, right=True).squeeze(1)
    logps = log_p.gather(1, ids.unsqueeze(1)).squeeze(1)
    log_kept_mass = logps
    if inputs.uniform is not None:
        log_q = (scores / temperature).log_softmax(1)
        log_kept_mass = logps - log_q.gather(1, ids.unsqueeze(1)).squeeze(1)
    outputs.ids.copy_(ids.masked_fill(invalid, -1).masked_fill(empty, -2))
    outputs.logps.copy_(logps.masked_fill(failed, torch.nan))
    outputs.log_kept_mass.copy_(log_kept_mass.masked_fill(failed, torch.nan))
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(1)
    outputs.entropy.copy_(entropy.masked_fill(failed, torch.nan))
