"""A chunk of logits in plain PyTorch: the oracle of the kernels of ``linear_logps``.

With u = x, or softcap * tanh(x * logit_scale / softcap), z = u * inverse and p = softmax(z) (see ``Head``):
    logp = log p[target],  H = -sum_v p_v log p_v,
    dz = dlogp (onehot(target) - p) - dentropy p (log p + H),  dx = dz inverse du/dx.
"""

import torch

from vlmkernels.ops.linear_logps.inputs import SelectedRows


def unsupported(hidden: torch.Tensor) -> str | None:
    return None


def fwd(logits, hidden, selected: SelectedRows, head) -> None:
    """Write logp, entropy and stats of each row: stats are the maximum m of u, and log sum exp((u - m) inverse).

    The logp of a target below 0, a token of another part of the vocabulary, is -inf. That of a target of V or more is NaN.
    """
    targets, logp = selected.targets, selected.logp
    u, _ = head.capped(logits)
    maximum = u.max(-1, keepdim=True).values
    z = (u - maximum) * head.inverse
    log_sum = z.logsumexp(-1, keepdim=True)
    log_p = z - log_sum
    vocab = logits.shape[1]
    logp.copy_(log_p.gather(-1, targets.clamp(0, vocab - 1).unsqueeze(-1)).squeeze(-1))
    logp.masked_fill_(targets < 0, -torch.inf).masked_fill_(targets >= vocab, torch.nan)
    selected.entropy.copy_(-(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1))
    selected.stats.copy_(torch.cat([maximum, log_sum], -1))


def bwd(logits, selected: SelectedRows, head, out) -> None:
    """Write the gradient of the logits to ``out``, which may share their memory."""
    targets, stats, dlogp, dentropy = selected.targets, selected.stats, selected.dlogp, selected.dentropy
    u, slope = head.capped(logits)
    log_p = (u - stats[:, :1]) * head.inverse - stats[:, 1:]
    dlogp = dlogp.masked_fill(targets >= logits.shape[1], torch.nan)
    coefficient = dlogp.unsqueeze(-1)
    if dentropy is not None:
        finite = log_p.masked_fill(log_p == -torch.inf, 0)
        coefficient = coefficient + dentropy.unsqueeze(-1) * (finite + selected.entropy.unsqueeze(-1))
    here = targets >= 0
    one_hot = torch.where(here, dlogp, 0).unsqueeze(-1)
    dz = (-coefficient * log_p.exp()).scatter_add_(-1, targets.clamp(0, logits.shape[1] - 1).unsqueeze(-1), one_hot)
    out.copy_(dz * (head.inverse * slope))
