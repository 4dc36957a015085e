"""Opening images of untrusted datasets: their cost is known and limited before any pixel is decoded.

An image in every form gives the same RGB pixels; ``vlmkernels.ops.decode_image.pixels`` has the rules.
"""

import base64
import binascii
import io
import os
import re
import stat
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from vlmkernels.ops.decode_image import decode_image
from vlmkernels.ops.decode_image.pixels import EXIF_ERRORS, FORMATS, MAX_PIXELS, checked_orientation, orientation, scaled

# What ``open_image`` raises, and PIL when datasets opens an image. PIL raises SyntaxError for a broken PNG file.
IMAGE_ERRORS = (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError)
FETCH_TIMEOUT = 30.0  # seconds to wait for each read from a remote server

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://|(data):", re.IGNORECASE)


@dataclass(frozen=True)
class ImageLimits:
    """Limits of one image, or of one frame of a video. Error messages use the names of the fields of ``GRPOConfig``.

    Args:
        max_pixels: maximum of width times height. Default: the number of pixels above which PIL warns of a decompression bomb.
        max_bytes: maximum size of the file, before it is decoded.
        allow_urls: whether http and https URLs are fetched.

    Raises:
        ValueError: a limit is not positive, or max_pixels exceeds the limit at which PIL raises.
    """

    max_pixels: int = MAX_PIXELS
    max_bytes: int = 2**26
    allow_urls: bool = False

    def __post_init__(self) -> None:
        if self.max_pixels < 1:
            raise ValueError(f"max_image_pixels must be >= 1, got {self.max_pixels}")
        if self.max_bytes < 1:
            raise ValueError(f"max_image_bytes must be >= 1, got {self.max_bytes}")
        if Image.MAX_IMAGE_PIXELS is not None and self.max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
            raise ValueError(
                f"max_image_pixels must be at most {2 * Image.MAX_IMAGE_PIXELS}, above which PIL raises "
                f"(set PIL.Image.MAX_IMAGE_PIXELS for more), got {self.max_pixels}"
            )


DEFAULT_LIMITS = ImageLimits()


def scheme_of(value: Any) -> str | None:
    """Return the scheme of a URL ("http", "data", ...), or None for a path or another value."""
    found = _URL.match(value) if isinstance(value, str) else None
    return found and (found[1] or found[2]).lower()


def _check_bytes(size: int, limits: ImageLimits, name: str) -> None:
    if size > limits.max_bytes:
        raise ValueError(f"{name} must have at most {limits.max_bytes} bytes (max_image_bytes), got {size} bytes")


def _check_file(path: str | os.PathLike, limits: ImageLimits) -> None:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would block
        raise ValueError(f"image must be a regular file, got {os.fspath(path)}")
    _check_bytes(status.st_size, limits, "image")


def _decode_data_url(url: str, limits: ImageLimits) -> bytes:
    head, comma, content = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ValueError(f"data URL must begin with 'data:<type>;base64,', got {url!r:.60}")
    _check_bytes(len(content) // 4 * 3, limits, "data URL")
    try:
        return base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise ValueError(f"data URL must be base64, got {content!r:.40} ({error})") from error


def _fetch(url: str, limits: ImageLimits) -> bytes:
    opener = urllib.request.OpenerDirector()  # without file: and ftp:, which a redirect could lead to
    for handler in ("Proxy", "Unknown", "HTTP", "HTTPS", "HTTPRedirect", "HTTPDefaultError"):
        opener.add_handler(getattr(urllib.request, f"{handler}Handler")())
    opener.add_handler(urllib.request.HTTPErrorProcessor())
    try:
        with opener.open(url, timeout=FETCH_TIMEOUT) as response:
            content = response.read(limits.max_bytes + 1)
    except (urllib.error.URLError, TimeoutError) as error:
        raise OSError(f"{url:.200} was not fetched: {error}") from error
    _check_bytes(len(content), limits, f"{url:.200}")
    return content


def _read_url(url: str, scheme: str, limits: ImageLimits) -> bytes:
    if scheme == "data":
        return _decode_data_url(url, limits)
    if scheme not in ("http", "https"):
        raise ValueError(f"image must be a path, or a URL that begins with data:, http: or https:, got {url[:80]}")
    if not limits.allow_urls:
        raise ValueError(f"image must not be a remote URL unless allow_image_urls is set, got {url[:200]}")
    return _fetch(url, limits)


def open_image(value: Any, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Open an image without decoding its pixels.

    Args:
        value: a PIL image, a path, bytes, a ``{"bytes": ..., "path": ...}`` dict, a base64 data: URL, an http(s) URL if the
            limits allow it, or an array or tensor of pixels (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels C. Only the
            first frame of an animated file is used.
        limits: limits of its size, and whether URLs are fetched.

    Raises:
        ValueError, OSError, TypeError, SyntaxError: the value is not an image of ``FORMATS``, or exceeds the limits
            (``IMAGE_ERRORS``).
    """
    value = _without_dict(value)
    if hasattr(value, "dtype"):
        image = _from_array(value)
    else:
        image = value if isinstance(value, Image.Image) else _open_file(value, limits)
    size = f"{image.width} x {image.height}"
    if 0 in image.size:
        raise ValueError(f"image must not be empty, got {size} pixels")
    if image.width * image.height > limits.max_pixels:
        raise ValueError(f"image must have at most {limits.max_pixels} pixels (max_image_pixels), got {size}")
    return image


def _open_file(value: Any, limits: ImageLimits) -> Image.Image:
    """Check the size in bytes of an image that is given by bytes, URL or path, and open it."""
    if isinstance(value, bytes):
        _check_bytes(len(value), limits, "image")
    elif scheme := scheme_of(value):
        value = _read_url(value, scheme, limits)
    elif isinstance(value, (str, os.PathLike)):
        _check_file(value, limits)
    else:
        forms = "a PIL image, a path, bytes, a dict with bytes or path, or an array"
        raise TypeError(f"image must be {forms}, got {type(value).__name__}")
    try:
        return Image.open(io.BytesIO(value) if isinstance(value, bytes) else value, formats=FORMATS)
    except Image.DecompressionBombError as error:  # not a ValueError; PIL raises it for images far above the limit
        raise ValueError(f"image must have at most {limits.max_pixels} pixels (max_image_pixels): {error}") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{error}; formats: {', '.join(FORMATS)}") from error


@dataclass(frozen=True)
class ImageHeader:
    """The size of an upright image whose pixels are not decoded."""

    width: int
    height: int

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), as of a PIL image."""
        return self.width, self.height


def read_header(image: Image.Image) -> ImageHeader:
    """Return the upright size of an image from ``open_image`` without decoding it."""
    is_unread_png = image.format == "PNG" and getattr(image, "png", None) is not None and "exif" not in image.info
    found = _orientation_after_the_pixels(image) if is_unread_png else orientation(image)
    return ImageHeader(*(image.size[::-1] if found >= _FIRST_ON_ITS_SIDE else image.size))


_FIRST_ON_ITS_SIDE = 5  # EXIF orientations 5 to 8 exchange width and height


def _orientation_after_the_pixels(image: Any) -> int:
    """Return the orientation in an eXIf chunk that follows the pixels of a PNG file. PIL would decode the pixels to find it."""
    file, exif = image.fp, Image.Exif()
    start = file.tell()
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length = int.from_bytes(head[:4], "big")
            if head[4:] == b"eXIf":
                exif.load(file.read(length))
                return checked_orientation(exif)
            file.seek(length + 4, os.SEEK_CUR)
    except EXIF_ERRORS:
        pass
    finally:
        file.seek(start)
    return 1


def read_image(value: Any, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Open an image, decode it and convert it to RGB: ``decode_image(open_image(value, limits))``.

    Several threads can call this function.

    Raises:
        ValueError, OSError, TypeError, SyntaxError: see ``open_image``; or the pixels of a deep image are out of range.
    """
    with _opened(value, limits) as image:
        return decode_image(image)


def read_size(value: Any, limits: ImageLimits = DEFAULT_LIMITS) -> ImageHeader:
    """Open an image and read its header: ``read_header(open_image(value, limits))``. Several threads can call this function."""
    with _opened(value, limits) as image:
        return read_header(image)


_given_images = threading.Lock()  # several rows can have the same PIL image, whose file only one thread may read


@contextmanager
def _opened(value: Any, limits: ImageLimits) -> Iterator[Image.Image]:
    """Open an image, and close it unless the caller has opened it."""
    image = open_image(value, limits)
    if image is _without_dict(value):
        with _given_images:
            yield image
        return
    try:
        yield image
    finally:
        image.close()


def _without_dict(value: Any) -> Any:
    """Return the bytes or the path of an image in a dict as ``datasets`` stores it; other values as they are."""
    if isinstance(value, dict):
        return value.get("path") if value.get("bytes") is None else value["bytes"]
    return value


def _from_array(value: Any) -> Image.Image:
    """Convert an array or tensor of pixels to a PIL image."""
    pixels = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    shape = pixels.shape
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    elif pixels.ndim == 3 and shape[-1] not in (1, 3, 4):
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3, 4) or pixels.dtype.kind not in "buif":
        rule = "pixels (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels"
        raise ValueError(f"image must be {rule}, got {shape} of {pixels.dtype}")
    if pixels.dtype == bool:
        pixels = pixels * np.uint8(255)
    pixels = pixels if pixels.dtype == np.uint8 else scaled(pixels)
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))
