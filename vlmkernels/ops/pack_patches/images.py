"""Images as the kernels take them: views (T, 3, H, W) of uint8 pixels with any strides, and the table that describes them."""

import torch

from vlmkernels.ops.checks import require

# PIL's modes of more than 8 bits per channel: in a conversion to RGB their values would be cut off at 255.
_DEEP_MODES = ("I", "F")


def is_opaque(image) -> bool:
    """Whether a PIL image has neither an alpha channel nor a transparent colour."""
    return "A" not in image.getbands() and "transparency" not in image.info


def rgb_from_pil(image, name: str) -> torch.Tensor:
    """(H, W, 3): palette, grey and other modes become RGB, what is transparent lies on white, as in transformers >= 5.21."""
    import numpy
    from PIL import Image

    require(isinstance(image, Image.Image), name, "be a tensor, an array or a PIL image", type(image).__name__, TypeError)
    size = f"{image.height} x {image.width}"
    require(not image.mode.startswith(_DEEP_MODES), name, "have 8 bits per channel", f"mode {image.mode}, {size}", TypeError)
    try:
        if not is_opaque(image):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return torch.from_numpy(numpy.array(image.convert("RGB")))
    except (OSError, SyntaxError) as error:  # SyntaxError is what PIL raises for a broken PNG file
        raise ValueError(f"{name} must be a whole image, got {size} that does not decode: {error}") from error


def _check_dtype(image, name: str) -> None:
    if image.dtype == torch.uint8:  # a NumPy type is not equal to one of torch
        return
    dtype = str(image.dtype).removeprefix("torch.")
    require(dtype == "uint8", name, "have dtype uint8", f"{dtype}, {tuple(image.shape)}", TypeError)


def _as_tensor(image, name: str) -> torch.Tensor:
    if isinstance(image, torch.Tensor):
        _check_dtype(image, name)
        return image
    import numpy

    if isinstance(image, numpy.ndarray):
        _check_dtype(image, name)
        # torch takes neither negative strides nor memory that may not be written.
        return torch.from_numpy(numpy.require(image, requirements="CW"))
    return rgb_from_pil(image, name)


def as_frames(image, name: str) -> torch.Tensor:
    """The view (T, 3, H, W) of an image (H, W, 3) or (3, H, W), or of frames with a first axis T."""
    image = _as_tensor(image, name)
    shape = tuple(image.shape)
    is_rgb = len(shape) in (3, 4) and 3 in (shape[-3], shape[-1])
    require(is_rgb, name, "be (H, W, 3) or (3, H, W), or frames (T, ...) of that", shape)
    require(0 not in shape, name, "have pixels", shape)
    frames = image if len(shape) == 4 else image.unsqueeze(0)
    return frames if shape[-3] == 3 else frames.movedim(-1, 1)


def image_fields(frames: list[torch.Tensor], patch_size: int, temporal_patch_size: int) -> list[int]:
    """Per image the 9 fields of ``PatchImage`` in csrc/common/pack_patches.h."""
    fields, first_row = [], 0
    for image in frames:
        num_frames, _, height, width = image.shape
        grid_h, grid_w = height // patch_size, width // patch_size
        fields += (image.data_ptr(), *image.stride(), num_frames, grid_h, grid_w, first_row)
        first_row += -(-num_frames // temporal_patch_size) * grid_h * grid_w
    return fields


def image_table(fields: list[int], device: torch.device) -> torch.Tensor:
    """(9 n,) int64: the fields on ``device``. The copy does not wait for the device: the driver buffers so few bytes."""
    return torch.tensor(fields).to(device, non_blocking=True)
