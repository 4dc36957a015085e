"""What a tool returns -> the text and image parts of its message.

- A list of content blocks is content. Its blocks have the forms of data sets (``{"type": "image", "image": ...}``,
  ``{"type": "text", "text": ...}``, ``image_url``, ...); it can also hold strings and images.
- A PIL image, and a uint8 array or tensor (H, W, C) or (C, H, W) with 1, 3 or 4 channels C, is an image.
- Everything else, including a list without a block or an image, is ``str(result)``.

Only a block can name an image by its path, which is then opened as those of data sets are: a regular file, within the limits.
A string is always text. The rules for pixels are those of ``vlmkernels.data.images``: images become upright and RGB.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image

from vlmkernels.data.conversations import KINDS, normalized
from vlmkernels.data.images import IMAGE_ERRORS, ImageLimits, read_image

MAX_CHARACTERS = 2**20  # of the text of one result; a tokenizer would need seconds for more

Part = dict[str, Any]


class ToolError(Exception):
    """A result that cannot be shown to the model. The message is for the model."""


def content_parts(result: Any, limits: ImageLimits, max_images: int) -> list[Part]:
    """Return the content of a tool's message.

    Args:
        result: what the tool returned; see the rules of the module.
        limits: limits of each image, and whether URLs are fetched.
        max_images: maximum number of images.

    Returns:
        At least one part, ``{"type": "text", "text": str}`` or ``{"type": "image", "image": RGB PIL image}``. Adjacent texts
        are joined.

    Raises:
        ToolError: an image is too large or broken, a block is neither text nor an image, or there are too many images or
            characters.
    """
    blocks = _blocks(result)
    if blocks is None:
        return [{"type": "text", "text": _text(str(result))}]
    try:
        parts = normalized([{"role": "tool", "content": blocks}])[0]["content"]
    except (TypeError, ValueError) as error:
        raise ToolError(str(error).replace("prompt[0].content", "result")) from error
    for position, part in enumerate(parts):
        if part["type"] not in ("text", "image"):
            raise ToolError(f"result[{position}] must be text or an image, got type {part['type']}")
    if (count := sum(part["type"] == "image" for part in parts)) > max_images:
        raise ToolError(f"result must have at most {max_images} images, got {count}")
    joined: list[Part] = []
    for position, part in enumerate(parts):
        if part["type"] == "image":
            joined.append({"type": "image", "image": _image(part, f"result[{position}]", limits)})
        elif joined and joined[-1]["type"] == "text":
            joined[-1]["text"] += part["text"]
        elif part["text"]:
            joined.append(part)
    if not joined:
        return [{"type": "text", "text": ""}]
    texts = [part for part in joined if part["type"] == "text"]
    _check_length(sum(len(part["text"]) for part in texts))
    for part in texts:
        part["text"] = _text(part["text"])
    return joined


def error_parts(message: str) -> list[Part]:
    """Return the content of the message of a call that failed."""
    return [{"type": "text", "text": str({"error": message[:MAX_CHARACTERS]})}]


def is_media(value: Any) -> bool:
    """Return whether a result is one image, or a list with an image or a content block."""
    return bool(_blocks(value))


def _blocks(result: Any) -> list[Any] | None:
    """Return the blocks of a result that is content, or None if it is to be converted to a string."""
    if isinstance(result, (list, tuple)):
        blocks = [{"type": "image", "image": item} if _is_image(item) else item for item in result]
        is_content = any(map(_is_block, blocks)) or result == []
        return blocks if is_content else None
    if _is_image(result):
        return [{"type": "image", "image": result}]
    return [result] if _is_block(result) else None


def _is_block(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("type"), str) and value["type"] in KINDS


def _is_image(value: Any) -> bool:
    if isinstance(value, (np.ndarray, torch.Tensor)):
        is_uint8 = value.dtype in (np.uint8, torch.uint8)
        return is_uint8 and value.ndim == 3 and any(value.shape[axis] in (1, 3, 4) for axis in (0, -1))
    return isinstance(value, Image.Image)


def _image(part: Part, name: str, limits: ImageLimits) -> Image.Image:
    if "image" not in part:
        raise ToolError(f"{name} must have an image, got only its type")
    try:
        return read_image(part["image"], limits)
    except IMAGE_ERRORS as error:
        raise ToolError(f"{name} is not an image that can be used: {error}") from error


def _check_length(length: int) -> None:
    if length > MAX_CHARACTERS:
        raise ToolError(f"result must have at most {MAX_CHARACTERS} characters, got {length}")


def _text(text: str) -> str:
    """Return a text as a plain ``str``, also if it is an instance of a subclass."""
    _check_length(len(text))
    try:
        return text.encode().decode()
    except UnicodeEncodeError as error:
        raise ToolError(f"result must be valid Unicode, got {text[error.start]!r} at position {error.start}") from error
