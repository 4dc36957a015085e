"""Sequence bounds, windows and positions that a vision tower derives from the grids of its images. Imports only torch."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from vlmkernels.ops.arguments import as_grid

__all__ = ["VisionLayout", "vision_layout"]


class VisionLayout(NamedTuple):
    """The layout of N patches and N / merge_size**2 tokens. The fields of windows are None if the tower has no windows."""

    cu_seqlens: torch.Tensor  # (frame groups + 1,) int32, in patches: each frame group attends to itself
    max_seqlen: int
    position_ids: torch.Tensor  # (N, 2) int64: row and column of each patch in its image
    window_index: torch.Tensor | None  # (tokens,) int64: the tokens, window by window
    window_inverse: torch.Tensor | None  # (tokens,) int64: the position of each token in window_index
    cu_window_seqlens: torch.Tensor | None  # (windows + 1,) int32, in patches
    max_window_seqlen: int | None


def _bounds(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _decode(grid: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return (image, frame, row, column) of every cell of grids (n, 3), in raster order."""
    counts = grid.prod(1)
    image = torch.arange(len(grid)).repeat_interleave(counts)
    within = torch.arange(len(image)) - (counts.cumsum(0) - counts)[image]
    _, height, width = grid[image].T
    return image, within // (height * width), within // width % height, within % width


def _windows(tokens: torch.Tensor, side: int, merge_size: int) -> tuple[Any, ...]:
    """Return the fields of windows of side x side tokens, which are smaller at the lower and right edges of an image."""
    image, frame, row, column = _decode(tokens)
    across, down = -(-tokens[:, 2] // side), -(-tokens[:, 1] // side)
    counts = tokens[:, 0] * down * across
    first = (counts.cumsum(0) - counts)[image]
    window = first + (frame * down[image] + row // side) * across[image] + column // side
    index = window.argsort(stable=True)
    inverse = torch.empty_like(index)
    inverse[index] = torch.arange(len(index))
    lengths = window.bincount() * merge_size**2
    return index, inverse, _bounds(lengths), int(lengths.max())


@lru_cache(maxsize=256)
def _layout(grids: tuple[tuple[int, ...], ...], merge_size: int, window: int | None, device: torch.device) -> VisionLayout:
    grid = torch.tensor(grids)
    lengths = (grid[:, 1] * grid[:, 2]).repeat_interleave(grid[:, 0])
    tokens = grid // torch.tensor([1, merge_size, merge_size])
    _, _, row, column = _decode(tokens)
    # The patches of a token are in raster order.
    inner = torch.arange(merge_size)
    rows = row[:, None, None] * merge_size + inner[:, None]
    columns = column[:, None, None] * merge_size + inner
    positions = torch.stack([rows.expand(-1, -1, merge_size), columns.expand(-1, merge_size, -1)], -1).view(-1, 2)
    windows: tuple[Any, ...] = (None,) * 4 if window is None else _windows(tokens, window, merge_size)
    results = (_bounds(lengths), int(lengths.max()), positions, *windows)
    return VisionLayout._make(x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x for x in results)


def vision_layout(
    image_grid_thw: torch.Tensor,
    *,
    merge_size: int = 2,
    window_size: int | None = None,
    patch_size: int | None = None,
    device: torch.device | str | None = None,
) -> VisionLayout:
    """Compute sequence bounds, 2-D positions and attention windows of packed images for the Qwen-VL vision towers.

    Equivalent to ``get_vision_position_ids`` and ``get_vision_window_index`` of transformers. Results are cached by the values
    of the grids and shared between calls, so do not write to them.

    Args:
        image_grid_thw: (n, 3) integers on the CPU: frame groups, rows and columns of patches of each image.
        merge_size: the number of patches along each side of a token.
        window_size, patch_size: the sides of a window and of a patch in pixels (Qwen2.5-VL: 112 and 14). A window has
            window_size // patch_size // merge_size tokens along each side. None: the tower has no windows.
        device: the device of the results. Default: the CPU.

    Returns:
        ``VisionLayout``.

    Raises:
        ValueError, TypeError: the grids are empty, not on the CPU (reading them would wait for the device), or not divisible by
            merge_size: the error names the image.

    Source: Bai et al., Qwen2.5-VL (https://arxiv.org/abs/2502.13923), section 2.1.
    """
    image_grid_thw = as_grid("image_grid_thw", image_grid_thw)
    if image_grid_thw.device.type != "cpu":
        raise ValueError(f"image_grid_thw must be on the CPU, as a processor returns it, got {image_grid_thw.device.type}")
    if image_grid_thw.dim() != 2 or image_grid_thw.shape[1] != 3 or len(image_grid_thw) == 0:
        raise ValueError(f"image_grid_thw must be (n, 3) with n >= 1, got {tuple(image_grid_thw.shape)}")
    if (window_size is None) != (patch_size is None):
        raise ValueError(f"window_size and patch_size must both be given or both be None, got {window_size} and {patch_size}")
    grids = tuple(map(tuple, image_grid_thw.tolist()))
    for i, (frames, height, width) in enumerate(grids):
        if min(frames, height, width) <= 0 or height % merge_size or width % merge_size:
            raise ValueError(f"image_grid_thw[{i}] must be > 0, its rows and columns multiples of {merge_size}, got {grids[i]}")
    window = None
    if window_size is not None and patch_size is not None:
        window = window_size // patch_size // merge_size
        if window <= 0:
            raise ValueError(
                f"window_size must be at least patch_size * merge_size = {patch_size * merge_size}, got {window_size}"
            )
    return _layout(grids, merge_size, window, torch.device("cpu" if device is None else device))
