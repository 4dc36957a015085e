"""``linear_kl`` between the teacher's k most probable tokens and one event for all other tokens.

The passes over the vocabulary are those of ``linear_logps``: its softmax of a row whose k tokens are at -inf, and the gradient
of a softmax. The rest is computed for (n, k + 1) elements, in plain PyTorch.
"""

from typing import Any, NamedTuple

import torch

from vlmkernels.ops.linear_kl.divergence import divergence, gradient
from vlmkernels.ops.linear_kl.inputs import Pair, SelectedRows
from vlmkernels.ops.linear_logps import inputs as logps_inputs
from vlmkernels.ops.linear_logps.sweep import Head


def _without_target(rows: SelectedRows, stats: torch.Tensor, dlogp: torch.Tensor | None = None) -> logps_inputs.SelectedRows:
    """Return rows for the kernels of ``linear_logps`` whose target is no token of the vocabulary."""
    unused = torch.zeros_like(rows.divergence)
    targets = torch.full(unused.shape, -1, device=unused.device)
    return logps_inputs.SelectedRows(targets, unused, unused.clone(), stats, dlogp)


def _events(kernels: Any, logits: torch.Tensor, rows: SelectedRows, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probabilities (n, k + 1) of the events, and (m, log sum exp((u - m) inverse)) of each row, (n, 2)."""
    found = logits.gather(-1, rows.support)
    u = head.capped(found)[0].to(rows.divergence.dtype)
    stats = rows.stats.new_empty(len(logits), 2)
    logits.scatter_(-1, rows.support, -torch.inf)
    kernels.fwd(logits, logits[:, :0], _without_target(rows, stats), head)
    logits.scatter_(-1, rows.support, found)
    low, log_sum = stats.unbind(-1)
    if head.softcap is not None:  # the cap of -inf is finite
        share = rows.support.shape[-1] * ((-head.softcap - low) * head.inverse - log_sum).exp()
        log_sum = log_sum + torch.log1p(-share)
    maximum = torch.maximum(low, u.amax(-1))
    none = low <= torch.finfo(torch.float32).min  # every other token is impossible
    rest = torch.where(none, -torch.inf, (low - maximum) * head.inverse + log_sum)
    z = torch.cat([(u - maximum.unsqueeze(-1)) * head.inverse, rest.unsqueeze(-1)], -1)
    total = z.logsumexp(-1, keepdim=True)
    return z - total, torch.cat([maximum.unsqueeze(-1), total], -1)


class TopK(NamedTuple):
    """The kernels of ``linear_kl`` for a chunk, from those of ``linear_logps`` for each side."""

    student: Any
    teacher: Any

    def fwd(self, logits: torch.Tensor, teacher_logits: torch.Tensor, rows: SelectedRows, pair: Pair) -> None:
        """Write divergence, stats, support and teacher_logps of each row.

        The stats are those of the student, the log-probability of its other tokens, 0, and K.
        """
        rows.support.copy_(teacher_logits.topk(rows.support.shape[-1], sorted=False).indices)
        log_q, _ = _events(self.teacher, teacher_logits, rows, pair.teacher)
        log_p, stats = _events(self.student, logits, rows, pair.student)
        total, mean = divergence(log_p, log_q, pair.beta)
        rows.divergence.copy_(total)
        rows.teacher_logps.copy_(log_q)
        rows.stats.copy_(torch.cat([stats, log_p[:, -1:], torch.zeros_like(log_p[:, :1]), mean.unsqueeze(-1)], -1))

    def bwd(self, logits: torch.Tensor, _: object, rows: SelectedRows, pair: Pair, out: torch.Tensor) -> None:
        """Write the gradient of the student's logits to ``out``, which may share their memory.

        The probability of the event of all other tokens v is the sum of their p_v: each of them gets the share p_v / p_event of
        the event's gradient.
        """
        assert rows.upstream is not None
        head = pair.student
        stats, rest = rows.stats[:, :2].contiguous(), rows.stats[:, 2:3]
        u, slope = head.capped(logits.gather(-1, rows.support))
        log_p = torch.cat([(u - stats[:, :1]) * head.inverse - stats[:, 1:], rest], -1)
        dz = gradient(log_p, rows.teacher_logps, rows.stats[:, 4], pair.beta) * rows.upstream.unsqueeze(-1)
        probability = rest.squeeze(-1).exp()
        dlogp = torch.where(probability > 0, -dz[:, -1] / probability, 0)
        self.student.bwd(logits, _without_target(rows, stats, dlogp), head, out)
        out.scatter_(-1, rows.support, (dz[:, :-1] * (head.inverse * slope)).to(out.dtype))

    def sweep(
        self, logits: torch.Tensor, teacher_logits: torch.Tensor, rows: SelectedRows, pair: Pair, out: torch.Tensor
    ) -> None:
        """``fwd``, then ``bwd``."""
        self.fwd(logits, teacher_logits, rows, pair)
        self.bwd(logits, None, rows, pair, out)
