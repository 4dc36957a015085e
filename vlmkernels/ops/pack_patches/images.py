"""The inputs of the kernels: images as views (T, 3, H, W) of uint8 pixels, any strides, and the table that describes them."""

from array import array
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch

from vlmkernels.backend import resolve
from vlmkernels.ops.checks import dtype_name
from vlmkernels.ops.decode_image import decode_image, is_encoded, map_distinct, open_encoded


def rgb_from_pil(image: Any, name: str) -> torch.Tensor:
    """Convert a PIL image to RGB, (H, W, 3), by the rules of ``decode_image.pixels``. It can share memory with the image."""
    import numpy
    from PIL import Image

    from vlmkernels.ops.decode_image.pixels import RGBImage, is_opaque, on_white, with_8_bits

    if not isinstance(image, Image.Image):
        raise TypeError(f"{name} must be a tensor, an array, a PIL image, bytes or a path, got {type(image).__name__}")
    pixels = image.pixels if isinstance(image, RGBImage) else None
    if pixels is not None:
        return torch.from_numpy(pixels)
    size = f"{image.height} x {image.width}"
    try:
        image = with_8_bits(image)
        return torch.from_numpy(numpy.array(image if image.mode == "RGB" and is_opaque(image) else on_white(image)))
    except ValueError as error:  # deep pixels out of range
        raise ValueError(f"{name}: {error}") from error
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


def read_frames(
    images: list[Any], resize: Callable[[int, int], tuple[int, int]] | None = None, decoder: str = "auto"
) -> list[torch.Tensor]:
    """Read, decode and resize images on torch's number of threads; see ``pack_patches``."""
    decoder = resolve("decode_image", decoder)

    def read(index: int) -> torch.Tensor:
        image, name = images[index], f"images[{index}]"
        frames = as_frames(decode_file(image, name, decoder) if is_encoded(image) else image, name)
        return frames if resize is None else _resized(frames, name, resize)

    if resize is None and all(isinstance(image, torch.Tensor) for image in images):
        return list(map(read, range(len(images))))
    return map_distinct(read, images)


def decode_file(value: Any, name: str, decoder: str = "auto") -> Any:
    """Decode an image file to a PIL image in mode RGB; see ``open_encoded`` and ``decode_image``.

    Raises:
        ValueError: the file cannot be read or decoded.
        NotImplementedError: the named decoder does not support the file.
    """
    try:
        with open_encoded(value, name) as image:
            return decode_image(image, backend=decoder)
    except NotImplementedError as error:
        raise NotImplementedError(f"{name}: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:  # SyntaxError is what PIL raises for a broken PNG file
        if isinstance(error, ValueError) and str(error).startswith(name):
            raise
        raise ValueError(f"{name} must be a whole image file: {error}") from error


def _resized(frames: torch.Tensor, name: str, resize: Callable[[int, int], tuple[int, int]]) -> torch.Tensor:
    height, width = frames.shape[-2:]
    if frames.device.type != "cpu":  # torch resizes uint8 only on the CPU
        raise ValueError(f"{name} must be on the CPU to be resized, got {frames.device}")
    try:
        size = resize(height, width)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name} must have sides that can be resized, got {height} x {width}: {error}") from error
    if not isinstance(size, Sequence) or len(size) != 2 or not all(isinstance(side, Integral) and side > 0 for side in size):
        raise ValueError(f"resize must return (height, width), two integers > 0, got {size!r} for {name}, {height} x {width}")
    if tuple(size) == (height, width):
        return frames
    return torch.nn.functional.interpolate(frames, tuple(map(int, size)), mode="bicubic", antialias=True)


def image_table(fields: "array[int]", device: torch.device) -> torch.Tensor:
    """Copy the fields to ``device``, (9 n,) int64. This does not wait, because the driver buffers so few bytes."""
    return torch.frombuffer(fields, dtype=torch.int64).to(device, non_blocking=True)
