"""Rules for the pixels of images. Every decoder follows them, and so do images that are in memory.

- An image is upright: its EXIF orientation is applied, as in ``datasets`` and in ``load_image`` of transformers.
- What is transparent lies on white, as in the image processors of transformers >= 5.21.
- Deep images are scaled to 8 bits: 16 bits by 1 / 257, and floats by 255 unless one exceeds 1; then they must be in [0, 255].
"""

import struct
from typing import Any

import numpy as np
from PIL import ExifTags, Image

# Formats whose decoders read pixels only. PIL knows more formats, among them EPS, for which it runs Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 89_478_485  # the number of pixels above which PIL warns of a decompression bomb
# PIL's modes with more than 8 bits per channel: a conversion to RGB would clamp their values to 255.
DEEP_MODES = ("I", "F")
EXIF_ERRORS = (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error)


class RGBImage(Image.Image):
    """A PIL image in mode RGB of given pixels, which arrays can share. PIL's own copy of them is made at the first use.

    Args:
        pixels: (H, W, 3) uint8, contiguous.
    """

    pixels: np.ndarray | None = None  # None once PIL has its copy, which can change

    def __init__(self, pixels: np.ndarray) -> None:
        super().__init__()
        self._mode, self._size, self.pixels = "RGB", (pixels.shape[1], pixels.shape[0]), pixels

    def load(self) -> Any:
        """Copy the pixels to PIL's memory. All methods of PIL that need the pixels call this method."""
        pixels = self.pixels  # read once: reward functions on several threads can use an image
        if pixels is not None:
            self.im = Image.fromarray(pixels).im
            self.pixels = None
        return super().load()

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """Share the pixels with an array that cannot change them. The array keeps them alive."""
        pixels = self.pixels
        if pixels is None:
            return super().__array_interface__
        return {"version": 3, "shape": pixels.shape, "typestr": "|u1", "data": memoryview(pixels).toreadonly()}

    def __eq__(self, other: object) -> bool:
        """Compare as a plain image: PIL's images are equal only if they have the same class."""
        return self.copy() == (other.copy() if isinstance(other, RGBImage) else other)

    def tobytes(self, encoder_name: str = "raw", *args: Any) -> bytes:
        """Return the pixels as ``PIL.Image.Image.tobytes`` does."""
        pixels = self.pixels
        if pixels is None or encoder_name != "raw" or args:
            return super().tobytes(encoder_name, *args)
        return pixels.tobytes()


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1, upright, if there is none or it is broken. PIL applies that of TIFF files itself."""
    try:
        return 1 if image.format == "TIFF" else checked_orientation(image.getexif())
    except EXIF_ERRORS:
        return 1


def checked_orientation(exif: Image.Exif) -> int:
    """Return the orientation in EXIF data; 1 if it is not one of the numbers 1 to 8, as in ``PIL.ImageOps.exif_transpose``."""
    value = exif.get(ExifTags.Base.Orientation, 1)
    return int(value) if value in range(1, 9) else 1


def upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation. ``PIL.ImageOps.exif_transpose`` also rewrites the EXIF data, and fails if it is broken."""
    method = _UPRIGHT.get(orientation(image))
    return image if method is None else image.transpose(method)


_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def is_opaque(image: Image.Image) -> bool:
    """Return whether a PIL image has neither an alpha channel nor a transparent color."""
    return not {"A", "a"}.intersection(image.getbands()) and "transparency" not in image.info


def on_white(image: Image.Image) -> Image.Image:
    """Convert a PIL image with 8 bits per channel to RGB, with transparency on white, as in transformers >= 5.21."""
    if is_opaque(image):
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def with_8_bits(image: Image.Image) -> Image.Image:
    """Scale a deep image to 8 bits. Other images are returned as they are."""
    return Image.fromarray(scaled(np.asarray(image))) if image.mode.startswith(DEEP_MODES) else image


def scaled(pixels: np.ndarray) -> np.ndarray:
    """Scale integers of up to 16 bits, or floats, to uint8."""
    low, high = (pixels.min(), pixels.max()) if pixels.size else (0, 0)
    is_float = pixels.dtype.kind == "f"
    limit = 255 if is_float else 65535
    if not (low >= 0 and high <= limit):  # also for NaN
        rule = "[0, 1] or [0, 255]" if is_float else "[0, 65535]"
        raise ValueError(f"image must have pixels in {rule}, got {low} to {high}")
    if is_float:
        return np.rint(pixels * (255.0 if high <= 1 else 1.0)).astype(np.uint8)
    is_deep = pixels.dtype.itemsize == 2 or high > 255  # 32-bit integers can hold 8 or 16 bits
    return np.rint(pixels / 257.0 if is_deep else pixels).astype(np.uint8)
