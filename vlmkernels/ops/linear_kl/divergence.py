"""The divergence between two discrete distributions, and its gradient by the logits of the first.

Let p be the student's distribution, q the teacher's and M = beta q + (1 - beta) p. With KL(x || y) = sum_v x_v log(x_v / y_v):
    beta = 0   D = KL(q || p),                                G = p - q
    beta = 1   D = KL(p || q),                                G = p (log p - log q - K),          K = D
    between    D = beta KL(q || M) + (1 - beta) KL(p || M),   G = (1 - beta) p (log p - log M - K),  K = KL(p || M)
G is the derivative of D by the logits whose softmax is p. A term x log(x / y) is 0 for x = 0, and infinite for x > 0 = y.
"""

import math

import torch


def _terms(x: torch.Tensor, log_ratio: torch.Tensor) -> torch.Tensor:
    """x log(x / y), or 0 where x is 0. A NaN stays NaN."""
    return torch.where(x > 0, x * log_ratio, x)


def _log_mixture(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> torch.Tensor:
    return torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))


def divergence(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return D and K, summed over the last axis. K is 0 for beta = 0.

    The sums of KL(q || p) and KL(p || q) have the term sum_v (y_v - x_v) = 0 in addition: then every term is at least 0, and
    rounding errors of the normalization of p and q cancel.
    """
    p, q = log_p.exp(), log_q.exp()
    if beta == 0:
        total = (_terms(q, log_q - log_p) + (p - q)).sum(-1)
        return total, torch.zeros_like(total)
    if beta == 1:
        total = (_terms(p, log_p - log_q) + (q - p)).sum(-1)
        return total, total
    log_m = _log_mixture(log_p, log_q, beta)
    of_p = _terms(p, log_p - log_m)
    return (beta * _terms(q, log_q - log_m) + (1 - beta) * of_p).sum(-1), of_p.sum(-1)


def gradient(log_p: torch.Tensor, log_q: torch.Tensor, mean: torch.Tensor, beta: float) -> torch.Tensor:
    """Return G. ``mean`` is K, without the last axis."""
    p = log_p.exp()
    if beta == 0:
        return p - log_q.exp()
    other = log_q if beta == 1 else _log_mixture(log_p, log_q, beta)
    factor = 1.0 if beta == 1 else 1 - beta
    return factor * _terms(p, log_p - other - mean.unsqueeze(-1))
