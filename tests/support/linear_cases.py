"""Operands for the tests of linear_logps and linear_grpo_loss."""

import torch

KERNELS = ["cpp", "triton", "cuda"]
ROW = 4  # bytes of a logit of the widest dtype


def make(rows, vocab, width, dtype, device, bias=True, scale=3.0):
    """[hidden, weight, bias] with logits of about ``scale``, and targets. Every backend gets the same rounded values."""
    rng = torch.Generator().manual_seed(sum(rows) + vocab + width)
    hidden = torch.randn(*rows, width, generator=rng)
    weight = scale / width**0.5 * torch.randn(vocab, width, generator=rng)
    offset = torch.randn(vocab, generator=rng) if bias else None
    targets = torch.randint(vocab, rows, generator=rng).to(device)
    return [x if x is None else x.to(device, dtype) for x in (hidden, weight, offset)], targets
