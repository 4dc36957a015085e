"""Log-probability and entropy of the softmax, in plain PyTorch: the oracle of ``gather_logps``.

With z = x / temperature and p = softmax(z):  logp = log p[target],  H = -sum_v p_v log p_v.
Gradients:  dlogp/dz = onehot(target) - p,  dH/dz = -p (log p + H).
"""

import torch


def unsupported(logits: torch.Tensor) -> str | None:
    return None


def _log_softmax(x: torch.Tensor, temperature: float) -> torch.Tensor:
    return torch.log_softmax(x.to(torch.promote_types(x.dtype, torch.float32)) / temperature, dim=-1)


def _finite(log_p: torch.Tensor) -> torch.Tensor:
    """p log p is 0 for an impossible token, whose log p is -inf."""
    return log_p.masked_fill(log_p == -torch.inf, 0)


def fwd(logits, targets, mask, rows, temperature, logp, entropy, stats):
    """Write logp, entropy (unless it is empty) and stats, the row's maximum m and log sum exp((x - m) / temperature)."""
    x = logits.reshape(-1, logits.shape[-1])
    targets = targets.reshape(-1)
    asked = torch.arange(targets.numel(), device=x.device) if mask is None else mask.reshape(-1).nonzero().squeeze(1)
    x = x[asked if rows is None else rows.reshape(-1)[asked]]
    log_p = _log_softmax(x, temperature)
    maximum = x.max(-1, keepdim=True).values
    log_sum = ((x - maximum).to(log_p.dtype) / temperature).logsumexp(-1, keepdim=True)
    for out in (logp, entropy, stats):
        out.zero_()
    logp.view(-1)[asked] = log_p.gather(-1, targets[asked].unsqueeze(-1)).squeeze(-1)
    stats.view(-1, 2)[asked] = torch.cat([maximum.to(log_sum.dtype), log_sum], -1)
    if entropy.numel():
        entropy.view(-1)[asked] = -(log_p.exp() * _finite(log_p)).sum(-1)


def bwd(dlogp, targets, stats, dentropy, entropy, logits, mask, starts, temperature, out):
    """Write d/dlogits to ``out``. Result k belongs to row k, or to the row n with starts[n] <= k < starts[n + 1]."""
    x = logits.reshape(-1, logits.shape[-1])
    row = torch.arange(len(x), device=x.device)
    if starts is not None:
        row, asked = row.repeat_interleave(starts.diff()), slice(int(starts[-1]))
    else:
        asked = slice(None) if mask is None else mask.reshape(-1)
        row = row[asked]
    dlogp, targets = dlogp[asked].unsqueeze(-1), targets[asked].unsqueeze(-1)
    log_p = _log_softmax(x[row], temperature)
    dz = (-dlogp * log_p.exp()).scatter_add(-1, targets, dlogp)
    if dentropy is not None:
        dz -= dentropy[asked].unsqueeze(-1) * log_p.exp() * (_finite(log_p) + entropy[asked].unsqueeze(-1))
    gradient = torch.zeros(x.shape, dtype=dz.dtype, device=x.device).index_add_(0, row, dz / temperature)
    out.copy_(gradient.view(out.shape))
