"""A chunk of logits in plain PyTorch: the oracle of the kernels of ``linear_kl``.

With u = x, or softcap * tanh(x * logit_scale / softcap), and z = u * inverse (see ``Head``) of each side, p = softmax(z) of the
student and q = softmax(z) of the teacher. D, K and G are those of divergence.py. The gradient is
    dx = upstream G inverse du/dx.
The stats of a row are m and log sum exp((u - m) inverse) of the student, the same of the teacher, and K, where m is the maximum
of u.
"""

import torch

from vlmkernels.ops.linear_kl.divergence import divergence, gradient
from vlmkernels.ops.linear_kl.inputs import Pair, SelectedRows


def unsupported(*tensors: torch.Tensor) -> str | None:
    return None


def _softmax(logits, head, dtype):
    """m and log sum exp((u - m) inverse)."""
    u = head.capped(logits)[0].to(dtype)
    maximum = u.max(-1, keepdim=True).values
    return maximum, ((u - maximum) * head.inverse).logsumexp(-1, keepdim=True)


def _log_softmax(logits, head, maximum, log_sum):
    return (head.capped(logits)[0] - maximum) * head.inverse - log_sum


def fwd(logits, teacher_logits, rows: SelectedRows, pair: Pair) -> None:
    """Write divergence and stats of each row."""
    dtype = rows.divergence.dtype
    stats = _softmax(logits, pair.student, dtype), _softmax(teacher_logits, pair.teacher, dtype)
    log_p = _log_softmax(logits, pair.student, *stats[0])
    log_q = _log_softmax(teacher_logits, pair.teacher, *stats[1])
    total, mean = divergence(log_p, log_q, pair.beta)
    rows.divergence.copy_(total)
    rows.stats.copy_(torch.cat([*stats[0], *stats[1], mean.unsqueeze(-1)], -1))


def bwd(logits, teacher_logits, rows: SelectedRows, pair: Pair, out) -> None:
    """Write the gradient of the student's logits to ``out``, which may share their memory."""
    own_max, own_sum, max_, sum_, _ = rows.stats.split(1, -1)
    log_p = _log_softmax(logits, pair.student, own_max, own_sum)
    log_q = _log_softmax(teacher_logits, pair.teacher, max_, sum_)
    dz = gradient(log_p, log_q, rows.stats[:, 4], pair.beta) * rows.upstream.unsqueeze(-1)
    out.copy_(dz * (pair.student.inverse * pair.student.capped(logits)[1]))


def sweep(logits, teacher_logits, rows: SelectedRows, pair: Pair, out) -> None:
    """``fwd``, then ``bwd``."""
    fwd(logits, teacher_logits, rows, pair)
    bwd(logits, teacher_logits, rows, pair, out)
