"""Gradients by the pixels of images, measured at the input of the vision tower of a model."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from vlmkernels.conformance.batches import Sample
from vlmkernels.conformance.models import encode

NEAR = 2**-5  # of pixels between -2 and 2, of which those of different images differ by more than 1 somewhere, in any dtype
TOWERS = ("visual", "vision_tower")  # names of modules


def pixel_gradients(
    model: Any, processor: Any, samples: Sequence[Sample], logps: Callable[[], Sequence[torch.Tensor]]
) -> torch.Tensor:
    """Return the norm of the gradient of the log-probabilities of each sample (row) by the pixels of each sample (column).

    Pixels are assigned to samples by their values, so that they may reach the tower in any order and in several passes. The
    gradient is 0 for pixels that do not reach it.

    Args:
        logps: runs the model and returns the log-probabilities of the samples.
    """
    captured: list[torch.Tensor] = []

    def leaf(x: Any) -> Any:
        if not (isinstance(x, torch.Tensor) and x.is_floating_point()):
            return x
        captured.append(x.detach().clone().requires_grad_())
        return captured[-1]

    def capture(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return tuple(map(leaf, args)), {name: leaf(x) for name, x in kwargs.items()}

    tower = next(module for name, module in model.named_modules() if name.split(".")[-1] in TOWERS)
    handle = tower.register_forward_pre_hook(capture, with_kwargs=True)
    try:
        outputs = logps()
    finally:
        handle.remove()
    owners = [_owners(pixels, processor, samples) for pixels in captured]
    norms = torch.zeros(len(samples), len(samples), dtype=torch.float64)
    for row, output in enumerate(outputs):
        if not (captured and output.requires_grad):
            continue
        gradients = torch.autograd.grad(output.sum(), captured, retain_graph=True, allow_unused=True)
        for gradient, owner in zip(gradients, owners, strict=True):
            if gradient is not None:
                squares = gradient.detach().double().cpu().flatten(1).square().sum(1)
                norms[row] += owner.double().T @ squares
    return norms.sqrt()


def _owners(pixels: torch.Tensor, processor: Any, samples: Sequence[Sample]) -> torch.Tensor:
    """Return (rows, samples) bool: whether a row of pixels is of an image of a sample."""
    given = pixels.detach().cpu().flatten(1)
    columns = []
    for sample in samples:
        rows = encode(processor, [sample]).get("pixel_values", given[:0]).flatten(1)
        distances = torch.cdist(given.float(), rows.float(), p=torch.inf)
        columns.append((distances < NEAR).any(1))
    return torch.stack(columns, 1)
