"""Rescaling and normalization folded into the patch embedding of a vision tower, so that patches can be uint8 pixels.

With W' = W rescale / std, for pixels x:  W ((x rescale - mean) / std) + b = W' (x - 128) + b - sum W' (mean / rescale - 128).
Subtracting 128, which is close to the mean, keeps the precision of 16-bit operands: x and x - 128 are exact in bf16.
"""

from collections.abc import Callable, Sequence
from types import MethodType

import torch
from torch.nn.functional import linear

CENTER = 128.0


def patch_embeds(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the modules that embed patches of RGB frames with a convolution (Qwen2-VL to Qwen3.5-VL, GLM-4V).

    Modules whose convolution has LoRA adapters are left out, because its effective weight includes the adapters.
    """
    found = []
    for name, module in model.named_modules():
        proj = getattr(module, "proj", None)
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
    """Make ``model`` accept pixels from 0 to 255 in place of rescaled and normalized ones.

    ``pixel_values`` are then the rows of ``pack_patches(..., dtype=torch.uint8)``: (N, 3 Tp P P), or (N, 3 P P) for still
    images packed with temporal_patch_size=1, whose one frame stands for all Tp. These have a quarter of the bytes of bf16 rows.

    Changes ``model`` in place: the ``forward`` of each patch embedding. Parameters and their names stay the same: every forward
    pass computes the folded weight in fp32 from the original weight, which gets the gradient. ``unfold_patch_embed`` undoes it.

    The embeddings equal the original ones up to rounding: the difference is at most 1e-5 of their largest value in fp32; in
    bf16 their error against fp64 is at most twice the original error.

    Args:
        model: a model whose vision tower has a Conv3d ``patch_embed.proj``.
        mean, std: three numbers each, from the model's image processor.
        rescale: the factor from the model's image processor.
        stills_only: only rows of one frame are pixels; rows of Tp frames are still normalized, so that the model also accepts
            the output of its own processor.

    Returns:
        ``model``.

    Raises:
        ValueError: ``mean`` or ``std`` does not have three numbers, or a std is 0.
        NotImplementedError: the model has no such patch embedding, or with ``stills_only`` its rows have one frame.
    """
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            raise ValueError(f"{name} must have a value for each of 3 channels, got {values}")
    if not all(std):
        raise ValueError(f"std must not be 0, got {std}")
    modules = patch_embeds(model)
    if not modules:
        raise NotImplementedError(
            "model must have a vision tower whose patch_embed.proj is a Conv3d of 3 channels (Qwen2-VL to Qwen3.5-VL, GLM-4V), "
            f"got {type(model).__name__}"
        )
    frames = [module.proj.kernel_size[0] for module in modules]
    if stills_only and min(frames) == 1:
        raise NotImplementedError(f"model must have rows of more than one frame with stills_only, got {frames}")
    for module in modules:
        scale = rescale / torch.tensor(std, dtype=torch.float64)
        shift = torch.tensor(mean, dtype=torch.float64) / rescale - CENTER
        module.forward = MethodType(_folded_forward(scale, shift, stills_only), module)
    return model


def unfold_patch_embed(model: torch.nn.Module) -> torch.nn.Module:
    """Undo ``fold_patch_embed`` in ``model``, in place, and return it. A model that is not folded does not change."""
    for module in patch_embeds(model):
        vars(module).pop("forward", None)
    return model


def _folded_forward(
    scale: torch.Tensor, shift: torch.Tensor, stills_only: bool
) -> Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]:
    def forward(self: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
        proj = self.proj
        all_frames, one_frame = proj.weight[0].numel(), proj.weight[0, :, 0].numel()
        if stills_only and rows.shape[-1] == all_frames:
            return type(self).forward(self, rows)
        if rows.shape[-1] not in (all_frames, one_frame):
            raise ValueError(f"pixel_values must have rows of {all_frames} or {one_frame} pixels, got {tuple(rows.shape)}")
        weight = proj.weight.float() * scale.to(proj.weight.device, torch.float32, non_blocking=True).view(3, 1, 1, 1)
        offset = -(weight.sum((2, 3, 4)) @ shift.to(weight, non_blocking=True))
        if rows.shape[-1] == one_frame:
            weight = weight.sum(2)
        bias = offset if proj.bias is None else offset + proj.bias
        dtype = proj.weight.dtype
        return linear(rows.to(dtype) - CENTER, weight.flatten(1).to(dtype), bias.to(dtype))

    return forward
