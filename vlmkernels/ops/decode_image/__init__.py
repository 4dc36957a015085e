"""Decoding of image files to upright RGB pixels, by the decoders of other libraries.

The rules for pixels are in ``vlmkernels.ops.decode_image.pixels``; all decoders give the same pixels.
"""

import io
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from vlmkernels.backend import choose, load, resolve

__all__ = ["decode_image", "map_distinct", "map_on_threads", "open_encoded"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def is_encoded(value: Any) -> bool:
    """Return whether a value is the content of a file, a path, or a dict with one of them as ``datasets`` stores it."""
    return isinstance(value, (bytes, bytearray, memoryview, str, os.PathLike, dict))


def open_encoded(value: Any, name: str) -> Any:
    """Open an image file as a PIL image, whose pixels are not decoded yet.

    Args:
        value: the content of the file, its path, or a dict ``{"bytes": ..., "path": ...}``, which ``is_encoded``.
        name: name of the image in error messages.

    Raises:
        ValueError: the file is not an image of one of ``FORMATS``, or has more than ``MAX_PIXELS`` pixels.
        OSError: the file cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    from vlmkernels.ops.decode_image.pixels import FORMATS, MAX_PIXELS

    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if not is_encoded(value) or isinstance(value, dict):
        raise TypeError(f"{name} must have bytes or a path, got {type(value).__name__}")
    is_path = isinstance(value, (str, os.PathLike))
    if is_path and not os.path.isfile(value):  # reading a pipe would block
        raise ValueError(f"{name} must be an existing regular file, got {os.fspath(value):.200}")
    try:
        image = Image.open(value if is_path else io.BytesIO(bytes(value)), formats=FORMATS)
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} must be a {', '.join(FORMATS)} file that PIL can open: {error}") from error
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise ValueError(f"{name} must have at most {MAX_PIXELS} pixels, got {image.height} x {image.width}")
    return image


def decode_image(image: Any, *, backend: str = "auto") -> Any:
    """Decode the pixels of a PIL image, and convert them to upright RGB.

    Equivalent to::

        image = PIL.ImageOps.exif_transpose(image)
        if it has transparency: image = PIL.Image.alpha_composite(white, image.convert("RGBA"))
        image = image.convert("RGB")

    except that more than 8 bits per channel are scaled to 8 bits, where PIL would clip them.

    Args:
        image: a PIL image. An image from ``open_encoded`` or ``PIL.Image.open`` keeps its encoded content.
        backend: one of

            - "simplejpeg": the package simplejpeg, for gray and color JPEG images. It does not hold the interpreter's lock.
            - "pillow": PIL, for all images.
            - "auto": simplejpeg if it is installed, has the same pixels as PIL on this machine, and supports the image;
              otherwise PIL. PIL also decodes damaged files, so that it decides which of them raise.

    Returns:
        A PIL image in mode RGB. From simplejpeg it is an ``RGBImage``: PIL's copy of the pixels is made only if it is used.

    Raises:
        ValueError, OSError, SyntaxError: the file is broken, or the pixels of a deep image are out of range.
        NotImplementedError: the named backend does not support the image.

    Source: libjpeg-turbo (https://libjpeg-turbo.org), which both decoders use with the same settings.
    """
    wanted = resolve("decode_image", backend)
    chosen = choose("decode_image", wanted, torch.empty(0), image=image)
    try:
        return load("decode_image", chosen).decode(image)
    except ValueError:
        if wanted != "auto" or chosen == "pillow":
            raise
    return load("decode_image", "pillow").decode(image)


def map_on_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Return ``list(map(function, items))``, computed on torch's number of threads. The first error is raised."""
    items, threads = list(items), torch.get_num_threads()
    if threads == 1 or len(items) < 2:
        return list(map(function, items))
    with ThreadPoolExecutor(min(threads, len(items))) as pool:
        return list(pool.map(function, items))


def map_distinct(function: Callable[[int], Result], values: Sequence[object]) -> list[Result]:
    """Return ``[function(index) for index in range(len(values))]``, computed by ``map_on_threads``.

    ``function`` is called once for each distinct object, with its first index: an object can be in a batch several times, and
    PIL images must not be decoded by two threads.
    """
    first: dict[int, int] = {}
    for index, value in enumerate(values):
        first.setdefault(id(value), index)
    results = dict(zip(first, map_on_threads(function, first.values()), strict=True))
    return [results[id(value)] for value in values]
