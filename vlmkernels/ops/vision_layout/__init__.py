"""What a vision tower derives from the grids of its images: bounds, windows and positions, computed once per set of grids."""

from functools import lru_cache
from typing import NamedTuple

import torch

from vlmkernels.ops.checks import require, require_dtype


class VisionLayout(NamedTuple):
    """Of N patches, N / merge_size**2 tokens. The last four are None without windows."""

    cu_seqlens: torch.Tensor  # (frame groups + 1,) int32: the bounds of what attends to itself
    max_seqlen: int
    position_ids: torch.Tensor  # (N, 2) int64: row and column of each patch in its image
    window_index: torch.Tensor | None  # (tokens,) int64: the tokens, window by window
    window_inverse: torch.Tensor | None  # (tokens,) int64: where each token is in window_index
    cu_window_seqlens: torch.Tensor | None  # (windows + 1,) int32, in patches
    max_window_seqlen: int | None


def _bounds(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _decode(grid: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(image, frame, row, column) of every cell of grids (n, 3), in raster order."""
    counts = grid.prod(1)
    image = torch.arange(len(grid)).repeat_interleave(counts)
    within = torch.arange(len(image)) - (counts.cumsum(0) - counts)[image]
    _, height, width = grid[image].T
    return image, within // (height * width), within // width % height, within % width


def _windows(tokens: torch.Tensor, side: int, merge_size: int) -> tuple:
    """Of grids of tokens cut into windows of side x side tokens, smaller at the lower and right edges."""
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
    # The patches of a token, row by row.
    inner = torch.arange(merge_size)
    rows = row[:, None, None] * merge_size + inner[:, None]
    columns = column[:, None, None] * merge_size + inner
    positions = torch.stack(torch.broadcast_tensors(rows, columns), -1).view(-1, 2)
    windows = (None,) * 4 if window is None else _windows(tokens, window, merge_size)
    results = (_bounds(lengths), int(lengths.max()), positions, *windows)
    return VisionLayout(*(x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x for x in results))


def vision_layout(
    image_grid_thw: torch.Tensor,
    *,
    merge_size: int = 2,
    window_size: int | None = None,
    patch_size: int | None = None,
    device: torch.device | str | None = None,
) -> VisionLayout:
    """Sequence bounds, 2-D positions and attention windows of packed images, as the Qwen-VL vision towers use them.

    The results are remembered by the values of the grids and shared between calls: do not write to them.

    Args:
        image_grid_thw: (n, 3) int64 on the CPU, patches: frame groups, rows, columns.
        merge_size: patches along each side of a token.
        window_size, patch_size: in pixels; a window has window_size // patch_size // merge_size tokens along each side
            (Qwen2.5-VL: 112 and 14). None: the tower has no windows.
        device: of the results.

    Raises:
        ValueError, TypeError: grids that are empty, not on the CPU (reading them would wait for the device), or that
            merge_size does not divide: the image is named.

    Source: Bai et al., Qwen2.5-VL (https://arxiv.org/abs/2502.13923), section 2.1.
    """
    require_dtype("image_grid_thw", image_grid_thw, torch.int64)
    device_type = image_grid_thw.device.type
    require(device_type == "cpu", "image_grid_thw", "be on the CPU, as a processor returns it", device_type)
    ok = image_grid_thw.dim() == 2 and image_grid_thw.shape[1] == 3 and len(image_grid_thw) > 0
    require(ok, "image_grid_thw", "be (n, 3) with n >= 1", tuple(image_grid_thw.shape))
    both = (window_size is None) == (patch_size is None)
    require(both, "window_size and patch_size", "both be given or both be None", f"{window_size} and {patch_size}")
    grids = tuple(map(tuple, image_grid_thw.tolist()))
    for i, (frames, height, width) in enumerate(grids):
        divides = min(frames, height, width) > 0 and height % merge_size == 0 and width % merge_size == 0
        require(divides, f"image_grid_thw[{i}]", f"be > 0, its rows and columns multiples of {merge_size}", grids[i])
    window = None if window_size is None else window_size // patch_size // merge_size
    require(window is None or window > 0, "window_size", "hold a token", window_size)
    return _layout(grids, merge_size, window, torch.device("cpu" if device is None else device))
