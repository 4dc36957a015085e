"""The head of a model: how often it is called, and what reaches the GEMMs of decoding."""

import pytest
import torch
from support import tiny

from vlmkernels.models.head import call_in_head, output_head
from vlmkernels.models.packs import ScoringBatch


@pytest.mark.parametrize("calls", [0, 2])
def test_a_model_that_does_not_call_its_head_once_raises(monkeypatch, calls):
    """For example one that multiplies by the weight itself, or computes logits in chunks."""
    model, ids = tiny.text_model(), torch.arange(4).view(1, 4)
    head, inner = output_head(model), model.model

    def forward(input_ids, use_cache):
        hidden = inner(input_ids=input_ids).last_hidden_state
        return [head(hidden) for _ in range(calls)] or hidden @ head.weight.T

    monkeypatch.setattr(model, "forward", forward)
    batch = ScoringBatch({"input_ids": ids}, torch.tensor([1]), torch.tensor([2]))
    with pytest.raises(NotImplementedError, match=f"call its head once .*, got {calls} calls of Linear in Qwen2ForCausalLM"):
        call_in_head(model, batch, head, lambda hidden, *args, **options: hidden.sum())
