"""Images as rows of patches. Imports only torch: triton, ``_C``, numpy and PIL load on first use.

Data is prepared outside of compiled graphs, so this is a function on a list of images, not an operator of ``torch.library``.
"""

from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache
from numbers import Integral
from typing import Any, NamedTuple

import torch

from vlmkernels.backend import resolve, select
from vlmkernels.ops.checks import require_device, require_dtype, require_one_of, require_positive
from vlmkernels.ops.decode_image import is_encoded
from vlmkernels.ops.pack_patches.images import read_frames

__all__ = ["PackedPatches", "pack_patches"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)


class Layout(NamedTuple):
    """The order of the rows, the order of the features of a row, and the sizes. ``LAYOUTS`` has the default sizes."""

    channels_last: bool  # the features are (Tp, P, P, 3) instead of (3, Tp, P, P)
    merge_size: int  # rows are in blocks of merge_size x merge_size patches; 1: raster order
    temporal_patch_size: int
    patch_size: int | None = None  # has no default: the caller passes it


LAYOUTS = {
    "qwen2_vl": Layout(channels_last=False, merge_size=2, temporal_patch_size=2),
    "siglip2_naflex": Layout(channels_last=True, merge_size=1, temporal_patch_size=1),
    "pixtral": Layout(channels_last=False, merge_size=1, temporal_patch_size=1),
}


class PackedPatches(NamedTuple):
    """The rows of all images one after another, and their bounds.

    ``image_grid_thw`` is on the CPU, as a processor returns it: the host needs it to place the images among the tokens.
    """

    pixel_values: torch.Tensor  # (N, 3 * temporal_patch_size * patch_size**2)
    image_grid_thw: torch.Tensor  # (n, 3) int64: frame groups, rows and columns of patches of each image
    cu_seqlens: torch.Tensor  # (image_grid_thw[:, 0].sum() + 1,) int32: each frame group attends to itself


@lru_cache(maxsize=64)
def _table(
    mean: tuple[float, ...] | None, std: tuple[float, ...] | None, rescale: float, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    """Return (3, 256), the result for each pixel value of each channel, computed in fp32 as in transformers.

    None, for uint8: the result is the pixel.
    """
    if dtype == torch.uint8:
        return None
    pixels = torch.arange(256, dtype=torch.float32).expand(3, 256)
    if mean is None:
        values = pixels * rescale
    else:
        # The processors scale mean and std. (x * rescale - mean) / std would round differently.
        scaled_mean, scaled_std = (torch.tensor(m)[:, None] * (1.0 / rescale) for m in (mean, std))
        values = (pixels - scaled_mean) / scaled_std
    return values.to(device, dtype)


def _sizes(layout: str, patch_size: int, **sizes: int | None) -> Layout:
    """Return the layout with its sizes. A size of None is replaced by the default of ``LAYOUTS``."""
    require_one_of("layout", layout, LAYOUTS)
    chosen: dict[str, Any] = {"patch_size": patch_size}
    for name, size in sizes.items():
        default = getattr(LAYOUTS[layout], name)
        chosen[name] = default if size is None else size
        if default == 1 and chosen[name] != 1:
            raise ValueError(f"{name} must be 1 in layout {layout}, got {size}")
    for name, size in chosen.items():
        if not isinstance(size, Integral) or isinstance(size, bool) or size <= 0:
            raise ValueError(f"{name} must be an integer > 0, got {size}")
        chosen[name] = int(size)
    return LAYOUTS[layout]._replace(**chosen)


def _per_channel(name: str, values: Sequence[float] | None) -> tuple[float, ...] | None:
    if values is None:
        return None
    try:
        values = tuple(map(float, values))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must have a number for each of 3 channels, got {values!r}") from error
    if len(values) != 3:
        raise ValueError(f"{name} must have a number for each of 3 channels, got {values}")
    if name == "std" and not all(values):
        raise ValueError(f"{name} must not be 0, got {values}")
    return values


def _as_list(images: Any) -> list[Any]:
    """Return the images as a list. One image may stand alone, but not frames: (N, H, W, 3) could also be N images."""
    if isinstance(images, (list, tuple)):
        return list(images)
    if is_encoded(images):
        return [images]
    shape = getattr(images, "shape", None)
    if shape is not None and len(shape) != 3:
        raise ValueError(f"images must be a list of images, or one image (H, W, 3) or (3, H, W), got {tuple(shape)}")
    return [images]


def pack_patches(
    images: Any,
    *,
    patch_size: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    rescale: float = 1 / 255,
    merge_size: int | None = None,
    temporal_patch_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    layout: str = "qwen2_vl",
    resize: Callable[[int, int], tuple[int, int]] | None = None,
    out: torch.Tensor | None = None,
    decoder: str = "auto",
    backend: str = "auto",
) -> PackedPatches:
    """Rescale and normalize images of any sizes, and split them into the rows that a vision tower reads, in one pass.

    Equivalent, for one image ``x`` (3, H, W) in the layout qwen2_vl with P, M, Tp = 14, 2, 2, to::

        x = (x.float() - mean * (1 / rescale)) / (std * (1 / rescale))  # as in transformers
        x = x.view(3, H // P // M, M, P, W // P // M, M, P)
        x = x.permute(1, 4, 2, 5, 0, 3, 6)  # (block row, block column, M, M, 3, P, P)
        pixel_values = x.unsqueeze(5).expand(-1, -1, -1, -1, -1, Tp, -1, -1).reshape(-1, 3 * Tp * P * P).to(dtype)

    Args:
        images: a list of n uint8 images (H, W, 3) or (3, H, W), or videos with a first axis T of frames; or one image. On the
            CPU they may also be NumPy arrays of these shapes, PIL images, or image files: their content as bytes, paths, or
            dicts ``{"bytes": ..., "path": ...}``. PIL images are converted to RGB: transparency becomes white, and pixels of
            more than 8 bits are scaled to 8. Files are decoded to upright RGB in parallel, on torch's number of threads; see
            ``vlmkernels.ops.decode_image``. Tensors may have any strides, and all must be on one device. H and W, after
            ``resize``, must be multiples of patch_size * merge_size. A shape that fits both orders is read as (3, H, W).
        patch_size: P: 14 for Qwen2-VL and Qwen2.5-VL, 16 for Qwen3-VL, SigLIP2 and Pixtral.
        mean, std: (3,), the mean and standard deviation of each channel of the rescaled pixels; None: only rescale.
        rescale: multiplies the pixels before they are normalized.
        merge_size: M: rows are in blocks of M x M patches. Default 2 in the layout qwen2_vl, 1 in the others.
        temporal_patch_size: Tp: the number of frames in a row. Default 2 in the layout qwen2_vl, 1 in the others. A still
            image is repeated, and so is the last frame of a video whose T is not a multiple of Tp.
        dtype: the dtype of the rows: float32, bfloat16, float16, or uint8 for pixels that are neither rescaled nor normalized.
            Rows of still images in uint8 with temporal_patch_size=1 have a quarter of the bytes of the default in bfloat16.
        layout: "qwen2_vl" (Qwen2-VL to Qwen3-VL: features 3, Tp, P, P), "siglip2_naflex" (raster order, features P, P, 3) or
            "pixtral" (raster order, features 3, P, P: the windows of the tower's convolution).
        resize: returns the (height, width) to which an image of (height, width) is resized, for example ``smart_resize`` of
            transformers; None: no resizing. Images are resized on the CPU by bicubic interpolation with antialiasing, as in the
            processors, in parallel.
        out: a contiguous buffer of ``dtype`` with at least N rows: the first N rows are written and returned. One (pinned)
            buffer can serve all batches.
        decoder: the decoder of image files: "simplejpeg", "pillow" or "auto"; see ``decode_image``.
        backend: see ``vlmkernels.backend``.

    Returns:
        ``PackedPatches``. Its rows are bitwise equal to the fp32 results of the transformers processors, rounded to ``dtype``.

    Raises:
        ValueError, TypeError: an image is empty, does not have 3 channels of uint8, cannot be read or decoded, has more than
            89,478,485 pixels as a file, or has sides that are not such multiples (the error names its index and size); images
            are on several devices; a size, layout, mean, std or ``out`` is wrong.
        NotImplementedError: the named backend or decoder does not support these images.

    Source: the image processors of transformers for Qwen2-VL, SigLIP2 and Pixtral (https://github.com/huggingface/transformers).
    """
    images = _as_list(images)
    if not images:
        raise ValueError("images must hold at least one image, got 0")
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std must both be given or both be None, got {mean} and {std}")
    require_positive("rescale", rescale)
    if resize is not None and not callable(resize):
        raise TypeError(f"resize must be a function of height and width, got {resize!r}")
    sizes = _sizes(layout, patch_size, merge_size=merge_size, temporal_patch_size=temporal_patch_size)
    frames = read_frames(images, resize, decoder)
    device, multiple = frames[0].device, patch_size * sizes.merge_size
    # Python integers, because operations on small tensors would take longer than the kernel on a GPU. ``fields`` has the 9
    # fields of PatchImage in csrc/common/pack_patches.h for each image.
    grid, bounds, fields = array("q"), array("i", [0]), array("q")
    for i, image in enumerate(frames):
        if image.device != device:
            require_device(f"images[{i}]", image, device, "images[0]")
        num_frames, _, height, width = image.shape
        if height % multiple or width % multiple:
            raise ValueError(f"images[{i}] must have sides that are multiples of {multiple}, got {height} x {width}")
        groups, grid_h, grid_w = -(-num_frames // sizes.temporal_patch_size), height // patch_size, width // patch_size
        grid.extend((groups, grid_h, grid_w))
        first, rows = bounds[-1], grid_h * grid_w
        fields.extend((image.data_ptr(), *image.stride(), num_frames, grid_h, grid_w, first))
        bounds.extend(range(first + rows, first + rows * groups + 1, rows))
    num, features = bounds[-1], 3 * sizes.temporal_patch_size * patch_size**2
    fresh = out is None
    if out is None:
        out = torch.empty(num, features, dtype=dtype, device=device)
    else:
        require_dtype("out", out, dtype)
        require_device("out", out, device, "images")
        if out.dim() != 2 or len(out) < num or out.shape[1] != features:
            raise ValueError(f"out must be (at least {num}, {features}), got {tuple(out.shape)}")
        if not out.is_contiguous():
            raise ValueError(f"out must be contiguous, got strides {out.stride()}")
        out = out[:num]
    table = _table(_per_channel("mean", mean), _per_channel("std", std), float(rescale), dtype, device)
    select("pack_patches", resolve("pack_patches", backend), frames[0]).fwd(frames, fields, table, out, sizes, fresh)
    cu_seqlens = torch.frombuffer(bounds, dtype=torch.int32).to(device, non_blocking=True)
    return PackedPatches(out, torch.frombuffer(grid, dtype=torch.int64).view(-1, 3), cu_seqlens)
