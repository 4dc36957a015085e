"""Gradients by the images of samples, measured where a vision tower embeds patches of pixels."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from vlmkernels.conformance.adapter import Adapter
from vlmkernels.conformance.batches import Sample
from vlmkernels.conformance.models import encode

PATCH_EMBEDDINGS = ("patch_embed", "patch_embedding")  # names of modules
# Embeddings of patches have a standard deviation near 1: bf16 rounds them by less, and those of noise differ by more.
NEAR = 1 / 8


def pixel_gradients(adapter: Adapter, model: Any, processor: Any, samples: Sequence[Sample]) -> torch.Tensor:
    """Return norms of the gradients of the log-probabilities of each sample (row) by the images of each sample (column).

    The gradient is that by the embedded patches, which are a linear function of the pixels, so that a trainer may store pixels
    in any layout and dtype. Patches are assigned to samples by their values, so that they may reach the tower in any order and
    in several passes. The gradient is 0 for images that do not reach it.
    """
    alone: list[torch.Tensor | None] = []
    for sample in samples:
        found, _ = _embedded(model, partial(model, **encode(processor, [sample], device=model.device)))
        alone.append(torch.cat(found) if found else None)
    patches, logps = _embedded(model, lambda: adapter.logps(model, processor, samples, 1.0))
    norms = torch.zeros(len(samples), len(samples), dtype=torch.float64)
    for row, output in enumerate(logps):
        if not (patches and output.requires_grad):
            continue
        gradients = torch.autograd.grad(output.sum(), patches, retain_graph=True, allow_unused=True)
        for rows, gradient in zip(patches, gradients, strict=True):
            for column, own in enumerate(alone):
                if own is not None and gradient is not None:
                    distances = torch.cdist(rows.detach().float(), own.detach().float(), p=torch.inf)
                    norms[row, column] += gradient[distances.amin(1) < NEAR].double().square().sum().cpu()
    return norms.sqrt()


def _embedded(model: Any, run: Callable[[], Any]) -> tuple[list[torch.Tensor], Any]:
    """Return the embedded patches (rows, width) of each pass of the vision tower, as leaves of the graph, and the result."""
    leaves: list[torch.Tensor] = []

    def replace(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        leaves.append(output.detach().flatten(1).clone().requires_grad_())
        return leaves[-1].view(output.shape)

    modules = [module for name, module in model.named_modules() if name.split(".")[-1] in PATCH_EMBEDDINGS]
    handles = [module.register_forward_hook(replace) for module in modules]
    try:
        result = run()
    finally:
        for handle in handles:
            handle.remove()
    return leaves, result
