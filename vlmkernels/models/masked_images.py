"""Model inputs with masked images: the same prompts, in which parts of each image are black, or all of it is grey.

What the image adds to a prediction shows in the difference between both (PAPO, https://arxiv.org/abs/2507.06448).
"""

import secrets
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedConfig

from vlmkernels.models.families import PIXELS
from vlmkernels.models.inputs import ModelInputs, from_rows, to_rows

BLACK, GREY = 0, 128
MASK_RATIO = 0.6  # that of PAPO
PATCH_SIZE = 14  # pixels; that of PAPO
_SIDE = 64  # pixels of the image of one color


def check_mask_ratio(ratio: float) -> None:
    """Check the share of patches that the perception terms mask. Without masks there would be nothing to compare."""
    if not 0 < ratio <= 1:
        raise ValueError(f"mask_ratio must be in (0, 1], got {ratio}")


def uniform_pixels(
    processor: Any, level: int, media: Collection[str] = ("image",), arguments: Mapping[str, Any] | None = None
) -> dict[str, torch.Tensor]:
    """Return what a processor makes of an image and a video of one color: black is not 0 after normalization.

    Args:
        processor: the processor of a model.
        level: the color of each channel, 0 to 255.
        media: the kinds that are needed, of "image" and "video".
        arguments: arguments of every call of the processor, such as those of ``use_vision_ops``.

    Returns:
        By the name of the model input: the values of one patch, (D,), in inputs that consist of patches, and (C, 1, 1), the
        values of one pixel, in other inputs.
    """
    picture = np.full((_SIDE, _SIDE, 3), level, dtype=np.uint8)
    found = {}
    if "image" in media:
        options = (arguments or {}).get("images_kwargs", {})
        found |= processor.image_processor(images=[Image.fromarray(picture)], return_tensors="pt", **options)
    if "video" in media:
        frames = torch.from_numpy(np.stack([picture] * 4)).permute(0, 3, 1, 2)
        metadata = [{"total_num_frames": 4, "fps": 2.0, "frames_indices": [0, 1, 2, 3]}]
        options = {"video_metadata": metadata, "do_sample_frames": False}
        found |= processor.video_processor(videos=[frames], return_tensors="pt", **options)
    names = [name for name in PIXELS.values() if name in found]
    return {name: _one_patch(found[name], _real_patches(name, found[name], found)) for name in names}


def _one_patch(pixels: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Return the first patch, or the first pixel, of an image of one color; see ``_mask_rows``."""
    if _in_patches(pixels, real):
        return pixels.flatten(0, -2)[0]
    return pixels.flatten(0, -4)[0, :, :1, :1]


def patch_size_of(config: PreTrainedConfig) -> int:
    """Return the side of the patches of a model's vision tower, in pixels; ``PATCH_SIZE`` if the configuration has none."""
    size = getattr(getattr(config, "vision_config", None), "patch_size", None)
    return size if isinstance(size, int) else PATCH_SIZE


def mask_images(
    batch: ModelInputs,
    color: Mapping[str, torch.Tensor],
    ratio: float = 1.0,
    *,
    generator: torch.Generator | None = None,
    patch_size: int = PATCH_SIZE,
) -> ModelInputs:
    """Return model inputs in which parts of the images and videos have one color. All other inputs stay the same.

    In families whose inputs are patches, each patch is masked or not; in a video, each patch of each pair of frames. In other
    families these are squares of ``patch_size`` pixels. Padding stays as it is. Where an image is given as several tiles or
    crops, perhaps with an overview, each of them is masked independently.

    Args:
        batch: model inputs with pixels. Samples without images stay as they are.
        color: from ``uniform_pixels``.
        ratio: the probability with which each patch or square is masked; 1 masks all.
        generator: draws the masks, on the CPU, so that they do not depend on the device. Not used if ``ratio`` is 1.
        patch_size: the side of the squares, in pixels.

    Returns:
        The inputs. Their ``image_keys`` are new, so that features are not mistaken for those of other images.

    Raises:
        ValueError: ``ratio`` is not in [0, 1], the inputs have features in place of pixels, or ``color`` has no value for one
            of the inputs.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio must be in [0, 1], got {ratio}")
    family = batch.family
    _require_pixels(batch)
    inputs = dict(batch.inputs)
    for name in PIXELS.values():
        if name not in inputs:
            continue
        if name not in color:
            raise ValueError(f"color must have a value for {name} (family {family.name}), got {', '.join(color) or 'none'}")
        rows = to_rows(inputs[name], family.spec(name))
        masked = _mask_rows(rows, color[name].to(rows), ratio, generator, patch_size, _real_patches(name, rows, inputs))
        inputs[name] = from_rows(masked, family.spec(name))
    keys = batch.image_keys
    return replace(batch, inputs=inputs, image_keys=None if keys is None else _new_keys(keys))


def exchange_images(batch: ModelInputs) -> tuple[ModelInputs, torch.Tensor]:
    """Return model inputs in which samples have the images and videos of one another. All other inputs stay the same.

    Two samples can exchange their images if these differ and have the same number and sizes, as the other inputs say.

    Args:
        batch: model inputs with pixels.

    Returns:
        The inputs, and which samples have other images than before, (B,) bool on the CPU. Their ``image_keys`` are new.

    Raises:
        ValueError: the inputs have features in place of pixels.
    """
    family = batch.family
    _require_pixels(batch)
    parts = {}  # by input, of each sample
    for name, tensor in batch.inputs.items():
        spec = family.spec(name)
        if spec.axis != "token" and spec.indexes is None:
            parts[name] = to_rows(tensor, spec).split(batch.rows[spec.axis].tolist())
    pixels = [name for name in PIXELS.values() if name in parts]
    alike: dict[tuple, list[int]] = {}
    for sample in has_media(batch).nonzero()[:, 0].tolist():
        shapes = tuple(parts[name][sample].shape for name in pixels)
        others = tuple((name, str(part[sample].tolist())) for name, part in parts.items() if name not in pixels)
        alike.setdefault((shapes, others), []).append(sample)
    source = torch.arange(len(batch))
    for members in alike.values():
        for place, sample in enumerate(members):
            following = members[place + 1 :] + members[:place]
            equal = (all(torch.equal(parts[name][sample], parts[name][other]) for name in pixels) for other in following)
            source[sample] = next((other for other, same in zip(following, equal, strict=True) if not same), sample)
    moved = {name: torch.cat([parts[name][sample] for sample in source.tolist()]) for name in pixels}
    inputs = batch.inputs | {name: from_rows(rows, family.spec(name)) for name, rows in moved.items()}
    keys = None if batch.image_keys is None else _new_keys(batch.image_keys)
    return replace(batch, inputs=inputs, image_keys=keys), source != torch.arange(len(batch))


def media_of(batch: ModelInputs) -> set[str]:
    """Return which of "image" and "video" the samples have."""
    return {kind for kind in ("image", "video") if batch.rows[kind].any()}


def has_media(batch: ModelInputs) -> torch.Tensor:
    """Return which samples have an image or a video, (B,) bool on the CPU."""
    return batch.rows["image"] + batch.rows["video"] > 0


def _require_pixels(batch: ModelInputs) -> None:
    if "image_features" in batch.inputs:
        raise ValueError(f"inputs must have the pixels of their images (family {batch.family.name}), got image_features")


def _new_keys(keys: torch.Tensor) -> torch.Tensor:
    """Return keys that no other image has, in this or another batch. No random state changes."""
    return torch.tensor([secrets.randbits(63) for _ in keys], dtype=torch.int64)


def _real_patches(name: str, rows: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Return which patches of inputs (..., patches, D) are no padding, (..., patches) bool, where another input says so."""
    positions = inputs.get(f"{'image' if name == 'pixel_values' else 'video'}_position_ids")
    if positions is not None:
        return (positions >= 0).any(-1)
    mask = inputs.get("pixel_attention_mask")
    return mask.bool() if mask is not None and mask.shape == rows.shape[:2] else None


def _in_patches(rows: torch.Tensor, real: torch.Tensor | None) -> bool:
    """Whether rows are patches. Frames of patches have as many dimensions as an image of pixels."""
    return rows.dim() <= 3 or (real is not None and real.shape == rows.shape[:-1])


def _mask_rows(
    rows: torch.Tensor,
    color: torch.Tensor,
    ratio: float,
    generator: torch.Generator | None,
    size: int,
    real: torch.Tensor | None,
) -> torch.Tensor:
    """Return the rows of an input with masked patches.

    Args:
        rows: (N, D), (N, patches, D) or (N, frames, patches, D), patches; or (N, C, H, W) or (N, tiles, C, H, W), pixels.
        real: which patches are no padding. None: pixels are padded with zeros, and (N, D) has no padding.
    """
    in_patches = _in_patches(rows, real)
    height, width = rows.shape[-2:]
    grid = rows.shape[:-1] if in_patches else (*rows.shape[:-3], -(-height // size), -(-width // size))
    chosen = torch.ones(grid, dtype=torch.bool)
    if ratio < 1:
        chosen = torch.rand(grid, generator=generator) < ratio
    chosen = chosen.to(rows.device)
    if in_patches:
        if rows.dim() > 2:  # no pixel is exactly 0 after normalization
            chosen = chosen & ((rows != 0).any(-1) if real is None else real)
        return torch.where(chosen.unsqueeze(-1), color, rows)
    chosen = chosen.repeat_interleave(size, -2).repeat_interleave(size, -1)[..., :height, :width].unsqueeze(-3)
    return torch.where(chosen & (rows != 0).any(-3, keepdim=True), color, rows)
