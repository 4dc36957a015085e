"""Log-probability and entropy of the softmax in plain PyTorch: the oracle of ``gather_logps``.

With z = x / temperature and p = softmax(z):  logp = log p[target],  H = -sum_v p_v log p_v.
Gradients:  dlogp/dz = onehot(target) - p,  dH/dz = -p (log p + H).
"""

import torch

from vlmkernels.ops.gather_logps.inputs import Outputs, Results


def unsupported(logits: torch.Tensor) -> str | None:
    return None


def _log_softmax(x: torch.Tensor, temperature: float) -> torch.Tensor:
    return torch.log_softmax(x.to(torch.promote_types(x.dtype, torch.float32)) / temperature, dim=-1)


def _finite(log_p: torch.Tensor) -> torch.Tensor:
    """Replace -inf, the log p of an impossible token, by 0, so that p log p is 0."""
    return log_p.masked_fill(log_p == -torch.inf, 0)


def fwd(logits, targets, mask, rows, temperature: float, outputs: Outputs) -> None:
    """Write the outputs; the entropy only if it is not empty."""
    x = logits.reshape(-1, logits.shape[-1])
    targets = targets.reshape(-1)
    selected = torch.arange(targets.numel(), device=x.device) if mask is None else mask.reshape(-1).nonzero().squeeze(1)
    x = x[selected if rows is None else rows.reshape(-1)[selected]]
    log_p = _log_softmax(x, temperature)
    maximum = x.max(-1, keepdim=True).values
    log_sum = ((x - maximum).to(log_p.dtype) / temperature).logsumexp(-1, keepdim=True)
    for out in outputs:
        out.zero_()
    outputs.logp.view(-1)[selected] = log_p.gather(-1, targets[selected].unsqueeze(-1)).squeeze(-1)
    outputs.stats.view(-1, 2)[selected] = torch.cat([maximum.to(log_sum.dtype), log_sum], -1)
    if outputs.entropy.numel():
        outputs.entropy.view(-1)[selected] = -(log_p.exp() * _finite(log_p)).sum(-1)


def bwd(logits, results: Results, temperature: float, out) -> None:
    """Write the gradient of the logits to ``out``."""
    x = logits.reshape(-1, logits.shape[-1])
    row = torch.arange(len(x), device=x.device)
    if results.offsets is not None:
        row, selected = row.repeat_interleave(results.offsets.diff()), slice(int(results.offsets[-1]))
    else:
        selected = slice(None) if results.mask is None else results.mask
        row = row[selected]
    dlogp, targets = results.dlogp[selected].unsqueeze(-1), results.targets[selected].unsqueeze(-1)
    log_p = _log_softmax(x[row], temperature)
    dz = (-dlogp * log_p.exp()).scatter_add(-1, targets, dlogp)
    if results.dentropy is not None:
        entropy, dentropy = results.entropy[selected].unsqueeze(-1), results.dentropy[selected].unsqueeze(-1)
        dz -= dentropy * log_p.exp() * (_finite(log_p) + entropy)
    gradient = torch.zeros(x.shape, dtype=dz.dtype, device=x.device).index_add_(0, row, dz / temperature)
    out.copy_(gradient.view(out.shape))
