"""Compare gather_logps on any backend with the fp64 reference."""

import math

import torch

from support.budget import assert_within_budget
from vlmkernels import backend as backends
from vlmkernels import gather_logps


def run(logits, targets, backend, *, inplace_backward=False, **options):
    """logp, entropy and the gradient of a weighted sum of both."""
    device = "cpu" if backends.device_type(backend) == "cpu" else logits.device
    logits = logits.to(device).requires_grad_()
    options = {name: o.to(device) if isinstance(o, torch.Tensor) else o for name, o in options.items()}
    source = logits.clone() if inplace_backward else logits
    logp, entropy = gather_logps(
        source, targets.to(device), return_entropy=True, inplace_backward=inplace_backward, backend=backend, **options
    )
    weight = torch.linspace(-1, 2, logp.numel(), dtype=logp.dtype, device=device).view_as(logp)
    (dlogits,) = torch.autograd.grad([logp, entropy], logits, [weight, weight.flip(0) / 2])
    return {"logp": logp.detach().cpu(), "entropy": entropy.detach().cpu(), "dlogits": dlogits.cpu()}


def check(logits, targets, backend, **options):
    """Assert that a backend agrees with the fp64 reference, within the error of the eager computation in the same dtype."""
    inplace = options.pop("inplace_backward", False)
    exact = run(logits.double(), targets, "reference", **options)
    eager = run(logits, targets, "reference", **options)
    actual = run(logits, targets, backend, inplace_backward=inplace, **options)
    assert_results_within_budget(actual, eager, exact, logits.shape[-1])


def assert_results_within_budget(actual, eager, exact, vocab):
    """The scale of logp and entropy is at least log V: both are differences of terms of that size."""
    for name, value in exact.items():
        scale = None if name == "dlogits" or not value.numel() else max(math.log(vocab), value.abs().max().item())
        assert_within_budget(name, actual[name], eager[name], value, scale=scale)
