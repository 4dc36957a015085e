"""Decoding by PIL: all formats, and damaged files as far as PIL accepts them."""

from typing import Any

import torch

from vlmkernels.backend import installed


def unsupported(*tensors: torch.Tensor, image: Any = None) -> str | None:
    return None if installed("PIL") else "pillow is not installed"


def decode(image: Any) -> Any:
    from vlmkernels.ops.decode_image.pixels import on_white, upright, with_8_bits

    try:
        image.load()
    except (OSError, SyntaxError, ValueError, MemoryError):
        raise
    except Exception as error:  # PIL's plugins raise errors such as struct.error and KeyError for some damaged files
        raise ValueError(f"image must be a file that PIL decodes, got {type(error).__name__}: {error}") from error
    image = on_white(with_8_bits(upright(image)))
    image.info = {}  # the orientation in its EXIF data no longer applies
    return image
