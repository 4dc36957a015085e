"""The divergence of a model from a teacher, computed in place of the language-model head, without storing logits."""

from typing import Any, NamedTuple

import torch

from vlmkernels.models.head import Term, call_in_head
from vlmkernels.models.packs import ScoringBatch
from vlmkernels.ops.linear_kl import linear_kl

DIVERGENCE = "distillation/divergence"


class TeacherOutput(NamedTuple):
    """What the logits of N tokens are computed from: hidden states (N, H), and weight (V, H) and bias (V,) of the head."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None


@torch.no_grad()
def teacher_output(
    model: torch.nn.Module, batch: ScoringBatch, *, head: torch.nn.Module, copies_weight: bool = False
) -> TeacherOutput:
    """Run a teacher on a batch, up to its head.

    Args:
        model: the teacher, wrapped by FSDP2 or DeepSpeed or not.
        batch: the inputs, and the N tokens to score.
        head: its language-model head, from ``output_head``.
        copies_weight: return a copy of the head's weight and bias. Needed if they are sharded, and gathered only while the head
            runs.
    """

    def states(
        hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, rows: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, TeacherOutput]:
        if copies_weight:
            weight, bias = weight.clone(), None if bias is None else bias.clone()
        return hidden.new_zeros(1), TeacherOutput(hidden.reshape(-1, hidden.shape[-1])[rows], weight, bias)

    output: TeacherOutput = call_in_head(model, batch, head, states)[0][1]
    return output


def divergence_term(teacher: TeacherOutput, *, token_weight: float, **options: Any) -> Term:
    """Return a function for ``call_in_head`` that computes the divergence of the model from a teacher.

    Heads with different numbers of rows are compared over the rows that both have. The term is
    ``token_weight * linear_kl(...).sum()``. Its metrics are ``distillation/divergence``, the mean over the tokens, and
    ``tokens``, their number.

    Args:
        teacher: the teacher's output for N tokens, which must be the first N that the batch of the model scores.
        token_weight: the weight of each token.
        options: further arguments of ``linear_kl``.
    """

    def term(
        hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, rows: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        count, num_tokens = min(len(weight), len(teacher.weight)), len(teacher.hidden)
        loss = linear_kl(
            hidden,
            _first(weight, count),
            teacher.hidden,
            _first(teacher.weight, count),
            bias=_first(bias, count),
            teacher_bias=_first(teacher.bias, count),
            rows=rows[:num_tokens],
            token_weights=torch.full((num_tokens,), token_weight, dtype=torch.float32, device=hidden.device),
            **options,
        )
        mean = loss.detach() / (token_weight * max(num_tokens, 1))
        return loss, {DIVERGENCE: mean, "tokens": torch.full_like(mean, num_tokens)}

    return term


def _first(rows: torch.Tensor | None, count: int) -> torch.Tensor | None:
    # The gradient of a slice is a copy of the whole, so do not slice without need.
    return rows if rows is None or len(rows) == count else rows[:count]
