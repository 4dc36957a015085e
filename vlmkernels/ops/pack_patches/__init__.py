"""Images as rows of patches. Torch only: triton, ``_C``, numpy and PIL load on first use.

Data is prepared outside of any graph, so this is a function on a list of images, not an operator of ``torch.library``.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from vlmkernels.backend import resolve, select
from vlmkernels.ops.checks import require, require_device, require_dtype, require_positive
from vlmkernels.ops.pack_patches.images import as_frames

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
_ONE_OF_DTYPES = f"be one of {', '.join(map(str, DTYPES))}"


class Layout(NamedTuple):
    """The order of rows and of a row's features, and sizes; in ``LAYOUTS`` the default sizes, None: must be given."""

    channels_last: bool  # features (Tp, P, P, 3) instead of (3, Tp, P, P)
    merge_size: int  # rows in blocks of merge_size x merge_size patches; 1: raster order
    temporal_patch_size: int
    patch_size: int | None = None


LAYOUTS = {
    "qwen2_vl": Layout(channels_last=False, merge_size=2, temporal_patch_size=2),
    "siglip2_naflex": Layout(channels_last=True, merge_size=1, temporal_patch_size=1),
    "pixtral": Layout(channels_last=False, merge_size=1, temporal_patch_size=1),
}


class PackedPatches(NamedTuple):
    """The rows of all images one after another, and where each begins.

    ``image_grid_thw`` lies on the CPU, as a processor returns it: the host needs it to place the images among the tokens.
    """

    pixel_values: torch.Tensor  # (N, 3 * temporal_patch_size * patch_size**2)
    image_grid_thw: torch.Tensor  # (n, 3) int64: frame groups, rows and columns of patches of each image
    cu_seqlens: torch.Tensor  # (image_grid_thw[:, 0].sum() + 1,) int32: the bounds of each frame group, what attends to itself


@lru_cache(maxsize=64)
def _table(
    mean: tuple[float, ...] | None, std: tuple[float, ...] | None, rescale: float, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    """(3, 256): what becomes of each pixel of each channel, computed in fp32 as transformers does it; None: it stays."""
    if dtype == torch.uint8:
        return None
    pixels = torch.arange(256, dtype=torch.float32).expand(3, 256)
    if mean is None:
        values = pixels * rescale
    else:
        # Not (x * rescale - mean) / std: the processors scale mean and std instead, which rounds otherwise.
        mean, std = (torch.tensor(m)[:, None] * (1.0 / rescale) for m in (mean, std))
        values = (pixels - mean) / std
    return values.to(device, dtype)


def _sizes(layout: str, patch_size: int, **sizes: int | None) -> Layout:
    """The layout with its sizes, those of the table where they are None."""
    require(layout in LAYOUTS, "layout", f"be one of {', '.join(LAYOUTS)}", repr(layout))
    require(isinstance(patch_size, int) and patch_size > 0, "patch_size", "be an integer > 0", patch_size)
    chosen = {"patch_size": patch_size}
    for name, size in sizes.items():
        default = getattr(LAYOUTS[layout], name)
        chosen[name] = default if size is None else size
        if default == 1:
            require(chosen[name] == 1, name, f"be 1 in layout {layout}", size)
        require(isinstance(chosen[name], int) and chosen[name] > 0, name, "be an integer > 0", size)
    return LAYOUTS[layout]._replace(**chosen)


def _per_channel(name: str, values: Sequence[float] | None) -> tuple[float, ...] | None:
    if values is None:
        return None
    values = tuple(map(float, values))
    require(len(values) == 3, name, "have a value for each of 3 channels", values)
    require(name == "mean" or all(values), name, "not be 0", values)
    return values


def pack_patches(
    images: Sequence,
    *,
    patch_size: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    rescale: float = 1 / 255,
    merge_size: int | None = None,
    temporal_patch_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    layout: str = "qwen2_vl",
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> PackedPatches:
    """Images of any sizes, rescaled, normalised and cut into the rows that a vision tower takes, in one pass.

    Equivalent, for one image ``x`` (3, H, W) in the layout qwen2_vl with P, M, Tp = 14, 2, 2, to::

        x = (x.float() - mean * (1 / rescale)) / (std * (1 / rescale))  # as transformers does it
        x = x.view(3, H // P // M, M, P, W // P // M, M, P).permute(1, 4, 2, 5, 0, 3, 6)  # (.., .., M, M, 3, P, P)
        pixel_values = x.unsqueeze(5).expand(-1, -1, -1, -1, -1, Tp, -1, -1).reshape(-1, 3 * Tp * P * P).to(dtype)

    Args:
        images: a list of n uint8 images, each (H, W, 3), (3, H, W), a video with a first axis T of frames, or on the CPU
            numpy arrays of these shapes and PIL images, which become RGB (transparency on white) as in transformers. Any
            strides; all on one device. H and W are multiples of patch_size * merge_size. A shape that fits both orders
            is (3, H, W).
        patch_size: P, 14 for Qwen2-VL and Qwen2.5-VL, 16 for Qwen3-VL, SigLIP2 and Pixtral.
        mean, std: of each channel, in [0, 1]; None: rescaled only.
        rescale: what a pixel is multiplied by before it is normalised.
        merge_size: M, rows come in blocks of M x M patches. Default 2 in the layout qwen2_vl; 1 in the others.
        temporal_patch_size: Tp, frames in a row. Default 2 in the layout qwen2_vl; 1 in the others. A still image is
            repeated, the last frame of a video where T is not a multiple of Tp.
        dtype: of the rows: float32, bfloat16, float16; uint8: the pixels themselves, neither rescaled nor normalised. Such
            rows of still images say all with temporal_patch_size=1, a quarter of the bytes of bfloat16.
        layout: "qwen2_vl" (Qwen2-VL to Qwen3-VL: features 3, Tp, P, P), "siglip2_naflex" (raster order, features P, P, 3) or
            "pixtral" (raster order, features 3, P, P, which the tower's convolution takes as its windows).
        out: contiguous, of ``dtype``, at least as many rows as the images have: the first N of them are written and returned,
            so that one buffer, pinned perhaps, serves batch after batch.
        backend: see ``vlmkernels.backend``.

    Returns:
        ``PackedPatches``. Rows are the fp32 results of the transformers processors, rounded to ``dtype``, bit by bit.

    Raises:
        ValueError, TypeError: an image that is empty, has not 3 channels of uint8, does not decode or whose sides do not
            divide (its index and size are named); images on several devices; a wrong size, layout, mean, std or ``out``.
        NotImplementedError: the named backend does not serve these images.
    """
    require(isinstance(images, (list, tuple)), "images", "be a list or tuple", type(images).__name__, TypeError)
    require(len(images) > 0, "images", "hold at least one image", len(images))
    require(dtype in DTYPES, "dtype", _ONE_OF_DTYPES, dtype, TypeError)
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std must both be given or both be None, got {mean} and {std}")
    require_positive("rescale", rescale)
    sizes = _sizes(layout, patch_size, merge_size=merge_size, temporal_patch_size=temporal_patch_size)
    frames = [as_frames(image, f"images[{i}]") for i, image in enumerate(images)]
    device, multiple = frames[0].device, sizes.patch_size * sizes.merge_size
    # In integers: operations on small tensors would take longer than the kernel does on a GPU.
    grid, bounds = [], [0]
    for i, image in enumerate(frames):
        require_device(f"images[{i}]", image, device, "images[0]")
        num_frames, _, height, width = image.shape
        if height % multiple or width % multiple:
            raise ValueError(f"images[{i}] must have sides that are multiples of {multiple}, got {height} x {width}")
        groups, grid_h, grid_w = -(-num_frames // sizes.temporal_patch_size), height // patch_size, width // patch_size
        grid.append((groups, grid_h, grid_w))
        first, rows = bounds[-1], grid_h * grid_w
        bounds += range(first + rows, first + rows * groups + 1, rows)
    num, features = bounds[-1], 3 * sizes.temporal_patch_size * patch_size**2
    fresh = out is None
    if fresh:
        out = torch.empty(num, features, dtype=dtype, device=device)
    else:
        require_dtype("out", out, dtype)
        require_device("out", out, device, "images")
        fits = out.dim() == 2 and len(out) >= num and out.shape[1] == features
        require(fits, "out", f"be (at least {num}, {features})", tuple(out.shape))
        require(out.is_contiguous(), "out", "be contiguous", f"strides {out.stride()}")
        out = out[:num]
    table = _table(_per_channel("mean", mean), _per_channel("std", std), float(rescale), dtype, device)
    select("pack_patches", resolve(backend), frames[0]).fwd(frames, table, out, sizes, fresh)
    bounds = torch.tensor(bounds, dtype=torch.int32)
    return PackedPatches(out, torch.tensor(grid), bounds.to(device, non_blocking=True))
