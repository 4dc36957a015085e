"""A chunk of logits in plain PyTorch: the oracle of the row kernels of ``linear_logps``.

With u = x, or softcap * tanh(x * logit_scale / softcap), z = u * inverse and p = softmax(z) (see ``Head``):
    logp = log p[target],  H = -sum_v p_v log p_v,
    dz = dlogp (onehot(target) - p) - dentropy p (log p + H),  dx = dz inverse du/dx.
"""

import torch


def unsupported(hidden: torch.Tensor) -> str | None:
    return None


def _softmaxed(logits, head):
    """u, and du/dx, in the dtype of computation."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if head.softcap is None:
        return x, 1.0
    tanh = torch.tanh(x * (head.logit_scale / head.softcap))
    return head.softcap * tanh, head.logit_scale * (1 - tanh.square())


def fwd(logits, hidden, targets, head, logp, entropy, stats) -> None:
    """Write logp, entropy and stats, the maximum m of u and log sum exp((u - m) inverse), of each row.

    A target below 0 is in another part of the vocabulary: its logp is -inf. One of V or more is no token: NaN.
    """
    u, _ = _softmaxed(logits, head)
    maximum = u.max(-1, keepdim=True).values
    z = (u - maximum) * head.inverse
    log_sum = z.logsumexp(-1, keepdim=True)
    log_p = z - log_sum
    vocab = logits.shape[1]
    logp.copy_(log_p.gather(-1, targets.clamp(0, vocab - 1).unsqueeze(-1)).squeeze(-1))
    logp.masked_fill_(targets < 0, -torch.inf).masked_fill_(targets >= vocab, torch.nan)
    entropy.copy_(-(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1))
    stats.copy_(torch.cat([maximum, log_sum], -1))


def bwd(logits, targets, dlogp, dentropy, logp, entropy, stats, head, out) -> None:
    """Write the gradient by the logits to ``out``, which may share their memory. ``dentropy`` may be None: 0."""
    u, slope = _softmaxed(logits, head)
    log_p = (u - stats[:, :1]) * head.inverse - stats[:, 1:]
    dlogp = dlogp.masked_fill(targets >= logits.shape[1], torch.nan)
    coefficient = dlogp.unsqueeze(-1)
    if dentropy is not None:
        finite = log_p.masked_fill(log_p == -torch.inf, 0)
        coefficient = coefficient + dentropy.unsqueeze(-1) * (finite + entropy.unsqueeze(-1))
    here = targets >= 0
    one_hot = torch.where(here, dlogp, 0).unsqueeze(-1)
    dz = (-coefficient * log_p.exp()).scatter_add_(-1, targets.clamp(0, logits.shape[1] - 1).unsqueeze(-1), one_hot)
    out.copy_(dz * (head.inverse * slope))
