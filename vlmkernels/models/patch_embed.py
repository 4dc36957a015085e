"""Rescaling and normalisation folded into a vision tower's patch embedding, so that patches travel as uint8 pixels.

With W' = W rescale / std, of pixels x:  W ((x rescale - mean) / std) + b = W' (x - 128) + b - sum W' (mean / rescale - 128).
128 is about the mean: 16-bit operands then lose no more than they do with normalised ones (x and x - 128 are exact in bf16).
"""

from collections.abc import Sequence
from types import MethodType

import torch
from torch.nn.functional import linear

from vlmkernels.ops.checks import require

CENTRE = 128.0


def patch_embeds(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that embed patches of RGB frames by a convolution of their size, as in Qwen2-VL to Qwen3-VL and GLM-4V.

    Not those whose convolution LoRA adapts: its own weight is not all of it.
    """
    found = []
    for name, module in model.named_modules():
        proj = module._modules.get("proj")
        if name.endswith("patch_embed") and isinstance(proj, torch.nn.Conv3d) and proj.in_channels == 3:
            found.append(module)
    return found


def fold_patch_embed(
    model: torch.nn.Module,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    rescale: float = 1 / 255,
    stills_only: bool = False,
) -> torch.nn.Module:
    """Let ``model`` take pixels, 0 to 255, where it took rescaled and normalised ones; ``unfold_patch_embed`` undoes it.

    ``pixel_values`` are then rows of ``pack_patches(..., dtype=torch.uint8)``, a quarter of the bytes of bf16 rows where still
    images are packed with temporal_patch_size=1. No parameter changes, nor its name: the folded weight is made of the original
    one in every forward pass, in fp32, and gradients flow back to it.

    Args:
        model: whose vision tower has a Conv3d ``patch_embed.proj``; changed in place and returned.
        mean, std, rescale: those of the model's image processor; three numbers each, and a factor.
        stills_only: rows of one frame alone are pixels; those of Tp frames stay normalised ones, so that the model goes on to
            take what its own processor makes.

    Rows (N, 3 Tp P P), or (N, 3 P P): of one frame each, which stands for all Tp. The result differs from the unfolded one by
    rounding alone: within 1e-5 of its largest value in fp32; in bf16 no further from fp64 than twice what the unfolded one is.

    Raises:
        ValueError: mean or std are not three numbers, a std of 0; NotImplementedError: no such patch embedding, or with
            stills_only one whose rows have one frame.
    """
    for name, values in (("mean", mean), ("std", std)):
        require(len(values) == 3, name, "have a value for each of 3 channels", values)
    require(all(std), "std", "not be 0", std)
    modules = patch_embeds(model)
    rule = "have a vision tower whose patch_embed.proj is a Conv3d of 3 channels (Qwen2-VL to Qwen3-VL, GLM-4V)"
    require(bool(modules), "model", rule, type(model).__name__, NotImplementedError)
    frames = [module.proj.kernel_size[0] for module in modules]
    rule = "have rows of more than one frame, to tell stills from them"
    require(not stills_only or min(frames) > 1, "model", rule, frames, NotImplementedError)
    for module in modules:
        scale = rescale / torch.tensor(std, dtype=torch.float64)
        shift = torch.tensor(mean, dtype=torch.float64) / rescale - CENTRE
        module.forward = MethodType(_folded(scale, shift, stills_only), module)
    return model


def unfold_patch_embed(model: torch.nn.Module) -> torch.nn.Module:
    """The inverse of ``fold_patch_embed``: normalised patches again. Unchanged where nothing was folded."""
    for module in patch_embeds(model):
        vars(module).pop("forward", None)
    return model


def _folded(scale: torch.Tensor, shift: torch.Tensor, stills_only: bool):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        proj = self.proj
        whole, single = proj.weight[0].numel(), proj.weight[0, :, 0].numel()
        if stills_only and rows.shape[-1] == whole:
            return type(self).forward(self, rows)
        weight = proj.weight.float() * scale.to(proj.weight.device, torch.float32).view(3, 1, 1, 1)
        offset = -(weight.sum((2, 3, 4)) @ shift.to(weight))
        require(
            rows.shape[-1] in (whole, single), "pixel_values", f"have rows of {whole} or {single} pixels", tuple(rows.shape)
        )
        if rows.shape[-1] == single:
            weight = weight.sum(2)
        bias = offset if proj.bias is None else offset + proj.bias
        dtype = proj.weight.dtype
        return linear(rows.to(dtype) - CENTRE, weight.flatten(1).to(dtype), bias.to(dtype))

    return forward
