"""Decoding of JPEG images by the package simplejpeg.

It includes libjpeg-turbo, as PIL does, and uses it with the same settings (the accurate DCT, fancy upsampling). The decoder
runs without the interpreter's lock, so that the images of a batch are decoded in parallel, and it writes RGB without PIL's
fourth byte.
"""

import io
from functools import cache
from typing import Any

import torch

from vlmkernels.backend import installed

# How PIL.ImageOps.exif_transpose makes an image upright, as a view of its pixels (H, W, 3).
_UPRIGHT: dict[int, Any] = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x[::-1].swapaxes(0, 1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x.swapaxes(0, 1)[::-1],
}


def unsupported(*tensors: torch.Tensor, image: Any = None) -> str | None:
    if not installed("PIL"):
        return "pillow is not installed"
    if not installed("simplejpeg"):
        return "simplejpeg is not installed (the extra 'jpeg')"
    try:
        if not _equals_pillow():
            return "simplejpeg decodes to other pixels than PIL, which has another version or build of libjpeg"
    except ImportError as error:
        return f"simplejpeg does not load: {error}"
    if image is None:
        return None
    from PIL import JpegImagePlugin

    if not isinstance(image, JpegImagePlugin.JpegImageFile):
        return f"supports JPEG files, got {image.format or 'an image in memory'}"
    if image.mode not in ("L", "RGB"):
        return f"supports gray and RGB, got mode {image.mode}"
    # After load() there is no tile, draft() sets decoderconfig and perhaps the mode, and other frames have an offset.
    is_unread = len(image.tile) == 1 and image.tile[0][2] == 0 and image.fp is not None
    if not is_unread or image.decoderconfig or image.layers != len(image.mode):
        return "supports images that PIL has opened, and neither decoded nor prepared by draft()"
    return None


@cache
def _equals_pillow() -> bool:
    """Return whether both decoders give the same pixels. They might not if PIL is built with another libjpeg."""
    import numpy as np
    import simplejpeg
    from PIL import Image

    waves = np.add.outer(np.arange(43) ** 2, 5 * np.arange(61))[..., None] * np.array([1, 2, 3])
    pixels = (waves % 256).astype(np.uint8)
    contents = [simplejpeg.encode_jpeg(pixels, 75, "RGB", subsampling) for subsampling in ("444", "422", "420", "440", "411")]
    progressive = io.BytesIO()
    Image.fromarray(pixels).save(progressive, "JPEG", progressive=True, quality=50)
    contents.append(progressive.getvalue())
    # Without its last scans, a progressive file is smoothed, differently in different versions of libjpeg-turbo.
    contents.append(contents[-1][: contents[-1].rindex(b"\xff\xda")] + b"\xff\xd9")
    for content in contents:
        with Image.open(io.BytesIO(content)) as opened:
            if not np.array_equal(_pixels(content, opened.size), np.asarray(opened)):
                return False
    return True


def _pixels(content: Any, size: tuple[int, int]) -> Any:
    """Decode to (H, W, 3). An error or a warning of libjpeg raises ValueError."""
    import numpy as np
    import simplejpeg

    height, width = simplejpeg.decode_jpeg_header(content)[:2]
    if (width, height) != size:  # before the memory is allocated: the limits were checked for PIL's size
        raise ValueError(f"image must have the size that PIL reads, {size}, for simplejpeg, got {(width, height)}")
    return simplejpeg.decode_jpeg(content, "RGB", buffer=np.empty((height, width, 3), np.uint8))


def _content(image: Any) -> bytes:
    """Return the bytes of the file that PIL has opened. PIL can still read it."""
    file = image.fp
    if isinstance(file, io.BytesIO):
        return file.getvalue()
    position = file.tell()
    file.seek(0)
    content: bytes = file.read()
    file.seek(position)
    return content


def decode(image: Any) -> Any:
    import numpy as np

    from vlmkernels.ops.decode_image.pixels import RGBImage, orientation

    pixels = _pixels(_content(image), image.size)
    upright = _UPRIGHT.get(orientation(image))
    return RGBImage(pixels if upright is None else np.ascontiguousarray(upright(pixels)))
