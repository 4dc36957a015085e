"""Decoding by PIL: all formats, and damaged files as far as PIL accepts them."""

import torch
from PIL import Image, ImageOps

from vlmkernels.ops.decode_image.pixels import on_white, orientation, with_8_bits


def unsupported(*tensors: torch.Tensor, image: Image.Image | None = None) -> str | None:
    return None


def decode(image: Image.Image) -> Image.Image:
    image.load()
    if orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    return on_white(with_8_bits(image))
