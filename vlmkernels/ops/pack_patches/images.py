"""The inputs of the kernels: images as views (T, 3, H, W) of uint8 pixels, any strides, and the table that describes them."""

from array import array
from typing import Any

import torch

from vlmkernels.ops.checks import dtype_name

# PIL's modes with more than 8 bits per channel: a conversion to RGB would clamp their values to 255.
_DEEP_MODES = ("I", "F")


def is_opaque(image: Any) -> bool:
    """Return whether a PIL image has neither an alpha channel nor a transparent color."""
    return not {"A", "a"}.intersection(image.getbands()) and "transparency" not in image.info


def on_white(image: Any) -> Any:
    """Convert a PIL image with 8 bits per channel to RGB, with transparency on white, as in transformers >= 5.21."""
    from PIL import Image

    if is_opaque(image):
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def rgb_from_pil(image: Any, name: str) -> torch.Tensor:
    """Convert a PIL image to RGB, (H, W, 3); see ``on_white``."""
    import numpy
    from PIL import Image

    if not isinstance(image, Image.Image):
        raise TypeError(f"{name} must be a tensor, an array or a PIL image, got {type(image).__name__}")
    size = f"{image.height} x {image.width}"
    if image.mode.startswith(_DEEP_MODES):
        raise TypeError(f"{name} must have 8 bits per channel, got mode {image.mode}, {size}")
    try:
        return torch.from_numpy(numpy.array(on_white(image)))
    except (OSError, SyntaxError) as error:  # SyntaxError is what PIL raises for a broken PNG file
        raise ValueError(f"{name} must be a whole image, got {size} that does not decode: {error}") from error


def _as_tensor(image: Any, name: str) -> torch.Tensor:
    if isinstance(image, torch.Tensor):
        if image.dtype != torch.uint8:
            raise TypeError(f"{name} must have dtype uint8, got {dtype_name(image.dtype)}, {tuple(image.shape)}")
        return image
    import numpy

    if isinstance(image, numpy.ndarray):
        if image.dtype != numpy.uint8:
            raise TypeError(f"{name} must have dtype uint8, got {image.dtype}, {image.shape}")
        # torch supports neither negative strides nor read-only memory.
        return torch.from_numpy(numpy.require(image, requirements=["C", "W"]))
    return rgb_from_pil(image, name)


def as_frames(image: Any, name: str) -> torch.Tensor:
    """View an image (H, W, 3) or (3, H, W), or frames with a first axis T, as (T, 3, H, W)."""
    image = _as_tensor(image, name)
    shape = image.shape
    if len(shape) not in (3, 4) or 3 not in (shape[-3], shape[-1]):
        raise ValueError(f"{name} must be (H, W, 3) or (3, H, W), or frames (T, ...) of that, got {tuple(shape)}")
    if 0 in shape:
        raise ValueError(f"{name} must have pixels, got {tuple(shape)}")
    frames: torch.Tensor = image if len(shape) == 4 else image.unsqueeze(0)
    return frames if shape[-3] == 3 else frames.movedim(-1, 1)


def image_table(fields: "array[int]", device: torch.device) -> torch.Tensor:
    """Copy the fields to ``device``, (9 n,) int64. This does not wait, because the driver buffers so few bytes."""
    return torch.frombuffer(fields, dtype=torch.int64).to(device, non_blocking=True)
