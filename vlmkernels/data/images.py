"""Opening the images of a dataset, which may come from anyone: what they may cost is known before anything is decoded."""

import base64
import binascii
import io
import os
import re
import stat
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from PIL import Image, UnidentifiedImageError

from vlmkernels.ops.checks import require

# Decoders of pixels alone. PIL knows more formats, among them EPS, for which it runs Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# What ``open_image`` raises for a value that is no image, or one outside the limits, and PIL where datasets opens one; a
# SyntaxError is what it raises for a broken PNG file.
ERRORS = (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError)
FETCH_TIMEOUT = 30.0  # seconds without a byte from a remote server

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://|(data):", re.IGNORECASE)


@dataclass(frozen=True)
class ImageLimits:
    """What one image, or one frame of a video, may be.

    max_pixels: width times height; by default the number beyond which PIL warns of a decompression bomb. max_bytes: of the
    file, before it is decoded. allow_urls: whether http and https addresses are fetched.

    Raises:
        ValueError: a limit is not positive, or max_pixels above what PIL itself opens.
    """

    max_pixels: int = 89_478_485
    max_bytes: int = 2**26
    allow_urls: bool = False

    def __post_init__(self) -> None:
        require(self.max_pixels >= 1, "max_image_pixels", "be >= 1", self.max_pixels)
        require(self.max_bytes >= 1, "max_image_bytes", "be >= 1", self.max_bytes)
        if Image.MAX_IMAGE_PIXELS is not None:
            most = 2 * Image.MAX_IMAGE_PIXELS
            rule = f"be at most {most}, where PIL refuses (raise PIL.Image.MAX_IMAGE_PIXELS for more)"
            require(self.max_pixels <= most, "max_image_pixels", rule, self.max_pixels)


DEFAULT = ImageLimits()


def scheme_of(value: Any) -> str | None:
    """ "http", "data", ... of an address; None of a path."""
    found = _URL.match(value) if isinstance(value, str) else None
    return found and (found[1] or found[2]).lower()


def _within(size: int, limits: ImageLimits, what: str) -> None:
    require(size <= limits.max_bytes, what, f"have at most {limits.max_bytes} bytes (max_image_bytes)", f"{size} bytes")


def _check_file(path: str | os.PathLike, limits: ImageLimits) -> None:
    status = os.stat(path)
    require(stat.S_ISREG(status.st_mode), "image", "be a regular file", os.fspath(path))  # a pipe would be waited for
    _within(status.st_size, limits, "image")


def _of_data_url(url: str, limits: ImageLimits) -> bytes:
    head, comma, content = url.partition(",")
    require(bool(comma) and head.lower().endswith(";base64"), "data URL", "begin with data:<type>;base64,", f"{url!r:.60}")
    _within(len(content) // 4 * 3, limits, "data URL")
    try:
        return base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise ValueError(f"data URL must be base64, got {content!r:.40} ({error})") from error


def _fetch(url: str, limits: ImageLimits) -> bytes:
    opener = urllib.request.OpenerDirector()  # without files and ftp, which a redirect could lead to
    for handler in (
        "Proxy",
        "Unknown",
        "HTTP",
        "HTTPS",
        "HTTPRedirect",
        "HTTPDefaultError",
    ):
        opener.add_handler(getattr(urllib.request, f"{handler}Handler")())
    opener.add_handler(urllib.request.HTTPErrorProcessor())
    try:
        with opener.open(url, timeout=FETCH_TIMEOUT) as response:
            content = response.read(limits.max_bytes + 1)
    except (urllib.error.URLError, TimeoutError) as error:
        raise OSError(f"{url:.200} was not fetched: {error}") from error
    _within(len(content), limits, f"{url:.200}")
    return content


def _of_url(url: str, scheme: str, limits: ImageLimits) -> bytes:
    if scheme == "data":
        return _of_data_url(url, limits)
    require(scheme in ("http", "https"), "image", "be a path, or an address that begins with data:, http: or https:", url[:80])
    require(limits.allow_urls, "image", "be no remote address unless allow_image_urls is set", url[:200])
    return _fetch(url, limits)


def open_image(value: Any, limits: ImageLimits = DEFAULT) -> Image.Image:
    """The image that a column's value stands for; its pixels are not decoded yet.

    Args:
        value: a PIL image, a path, bytes, a ``{"bytes": ..., "path": ...}`` dict, a data: URL of base64, or, where the limits
            allow it, an http(s) address. Of an animated file the first frame counts, and no other is decoded.

    Raises:
        ValueError, OSError, TypeError, SyntaxError: it is no image of ``FORMATS``, or outside the limits (``ERRORS``).
    """
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, Image.Image):
        image = value
    else:
        if isinstance(value, bytes):
            _within(len(value), limits, "image")
        elif scheme := scheme_of(value):
            value = _of_url(value, scheme, limits)
        elif isinstance(value, (str, os.PathLike)):
            _check_file(value, limits)
        else:
            rule = "be a PIL image, a path, bytes or a dict with bytes or path"
            require(False, "image", rule, type(value).__name__, TypeError)
        try:
            image = Image.open(io.BytesIO(value) if isinstance(value, bytes) else value, formats=FORMATS)
        except Image.DecompressionBombError as error:  # far beyond the limit, and no ValueError
            raise ValueError(f"image must have at most {limits.max_pixels} pixels (max_image_pixels): {error}") from error
        except UnidentifiedImageError as error:
            raise ValueError(f"{error}; formats: {', '.join(FORMATS)}") from error
    size = f"{image.width} x {image.height}"
    require(0 not in image.size, "image", "not be empty", f"{size} pixels")
    rule = f"have at most {limits.max_pixels} pixels (max_image_pixels)"
    require(image.width * image.height <= limits.max_pixels, "image", rule, size)
    return image
