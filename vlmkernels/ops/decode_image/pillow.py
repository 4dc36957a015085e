"""Decoding by PIL: all formats, and damaged files as far as PIL accepts them."""

from typing import Any

import torch

from vlmkernels.backend import installed


def unsupported(*tensors: torch.Tensor, image: Any = None) -> str | None:
    return None if installed("PIL") else "pillow is not installed"


def decode(image: Any) -> Any:
    from PIL import ImageOps

    from vlmkernels.ops.decode_image.pixels import on_white, orientation, with_8_bits

    image.load()
    if orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    return on_white(with_8_bits(image))
