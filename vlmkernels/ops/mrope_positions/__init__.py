"""Positions of M-RoPE for text with images and videos: for all sequences at once, without waiting for a device."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from vlmkernels.ops.arguments import as_cu_seqlens, as_grid, as_indices, as_mask, as_tensor
from vlmkernels.ops.checks import require_device, require_shape

__all__ = ["MropePositions", "mrope_positions"]

IMAGE, VIDEO = 1, 2  # mm_token_type_ids; 0 is text


class MropePositions(NamedTuple):
    """The results of ``mrope_positions``."""

    position_ids: torch.Tensor  # (3, ...) int64: time, height and width of each token; 0 for padding
    deltas: torch.Tensor  # (B, 1) int64: the position of the next token after the sequence, minus the number of tokens


def _token_grid(name: str, grid: torch.Tensor | None, merge_size: int, device: torch.device) -> torch.Tensor:
    """Return (n, 3) int32 on ``device``: the frames, rows and columns of tokens of each image or video."""
    if grid is None:
        return torch.empty(0, 3, dtype=torch.int32, device=device)
    grid = as_grid(name, grid)
    if grid.dim() != 2 or grid.shape[1] != 3:
        raise ValueError(f"{name} must be (n, 3), got {tuple(grid.shape)}")
    merge = torch.tensor([1, merge_size, merge_size]).to(grid.device, non_blocking=True)
    return (grid // merge).int().to(device, non_blocking=True)


def _check_runs(kind: str, is_kind: torch.Tensor, begins: torch.Tensor, bounds: torch.Tensor, grids: torch.Tensor) -> None:
    """Check that each run of vision tokens has a grid with its number of tokens. It would wait for a GPU: CPU only."""
    starts = begins.nonzero()[:, 0]
    lengths = torch.diff(starts, append=bounds[-1:].to(starts.dtype))
    chosen = is_kind[starts]
    starts, lengths = starts[chosen], lengths[chosen]
    if len(grids) != len(starts):
        raise ValueError(
            f"{kind}_grid_thw must have a grid per run of {kind} tokens, got {len(grids)} grids and {len(starts)} runs"
        )
    bad = (grids.prod(1) != lengths).nonzero()[:, 0]
    if len(bad):
        i = int(bad[0])
        sequence = int(torch.searchsorted(bounds, starts[i], right=True)) - 1
        raise ValueError(
            f"{kind}_grid_thw[{i}] must be the grid of its tokens, got {tuple(grids[i].tolist())} tokens for a run of"
            f" {int(lengths[i])} in sequence {sequence}"
        )


def _bounds(
    mm_token_type_ids: torch.Tensor, attention_mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    """Check the shapes, and return (B + 1,) int64, the bounds of the sequences in the flattened token types."""
    shape, device = mm_token_type_ids.shape, mm_token_type_ids.device
    if cu_seqlens is not None:
        if len(shape) != 1:
            raise ValueError(f"mm_token_type_ids must be (N,) with cu_seqlens, got {tuple(shape)}")
        if attention_mask is not None:
            raise ValueError("attention_mask must be None with cu_seqlens, got a tensor")
        if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
            raise ValueError(f"cu_seqlens must be (B + 1,), got {tuple(cu_seqlens.shape)}")
        require_device("cu_seqlens", cu_seqlens, device, "mm_token_type_ids")
        return cu_seqlens.long()
    if len(shape) != 2:
        raise ValueError(f"mm_token_type_ids must be (B, S) without cu_seqlens, got {tuple(shape)}")
    return torch.arange(shape[0] + 1, device=device) * shape[1]


def mrope_positions(
    mm_token_type_ids: torch.Tensor,
    image_grid_thw: torch.Tensor | None = None,
    video_grid_thw: torch.Tensor | None = None,
    *,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    merge_size: int = 2,
    frames_apart: bool = False,
    tokens_per_second: float | None = None,
    second_per_grid_ts: torch.Tensor | Sequence[float] | None = None,
) -> MropePositions:
    """Compute the M-RoPE positions of tokens on the axes time, height and width, for padded or packed sequences.

    Equivalent to ``get_rope_index`` of the Qwen-VL models in transformers. The positions of text increase by 1 per token on all
    three axes. An image or video is a run of tokens of its type: if it begins at position p, its token in frame t, row y and
    column x has the positions (p + t, p + y, p + x), and the next token after it has p + max(rows, columns).

    Args:
        mm_token_type_ids: (B, S), or packed (N,) with ``cu_seqlens``: 0 text, 1 image, 2 video, as processors return it.
        image_grid_thw, video_grid_thw: (n, 3) integers: frames, rows and columns of patches. The k-th run of a type in the
            batch has the k-th grid. On any device; from the CPU they are copied without waiting.
        attention_mask: (B, S), bool or 0 and 1 in any dtype: 0 for padding, which gets position 0.
        cu_seqlens: (B + 1,) integers, the bounds of packed sequences.
        merge_size: the number of patches along each side of a token.
        frames_apart: whether each frame of a video is a run of its own, after a timestamp, as in Qwen3-VL.
        tokens_per_second: the time position of frame t of the k-th video is t * tokens_per_second * second_per_grid_ts[k],
            rounded down, as in Qwen2.5-VL. None: frames are 1 position apart.
        second_per_grid_ts: the seconds between the frames of each video. None: 1 for each video.

    Returns:
        ``MropePositions``: position_ids (3, B, S) or (3, N), deltas (B, 1).

    Raises:
        ValueError, TypeError: a shape, dtype or device is wrong, or (on the CPU) runs of vision tokens do not match the grids.
            On a GPU this check would wait for the device.

    Source: Wang et al., Qwen2-VL (https://arxiv.org/abs/2409.12191), section 2.1.
    """
    mm_token_type_ids = as_indices("mm_token_type_ids", mm_token_type_ids)
    shape, device = mm_token_type_ids.shape, mm_token_type_ids.device
    attention_mask = as_mask("attention_mask", attention_mask, device)
    cu_seqlens = None if cu_seqlens is None else as_cu_seqlens(cu_seqlens, device)
    types, num = mm_token_type_ids.reshape(-1), mm_token_type_ids.numel()
    bounds = _bounds(mm_token_type_ids, attention_mask, cu_seqlens)
    lengths = bounds.diff()
    sequence = torch.arange(len(lengths), device=device).repeat_interleave(lengths, output_size=num)
    kept = None
    if attention_mask is not None:
        require_shape("attention_mask", attention_mask, shape, "mm_token_type_ids")
        require_device("attention_mask", attention_mask, device, "mm_token_type_ids")
        kept = attention_mask.reshape(-1)
        types = torch.where(kept, types, -1)  # padding ends a run

    begins = torch.ones(num + 1, dtype=torch.bool, device=device)  # one element more, for an empty last sequence
    begins[1:num] = types[1:] != types[:-1]
    begins.index_fill_(0, bounds[:-1], True)
    begins = begins[:num]
    is_image, is_video = types == IMAGE, types == VIDEO
    is_vision = is_image | is_video
    images = _token_grid("image_grid_thw", image_grid_thw, merge_size, device)
    videos = _token_grid("video_grid_thw", video_grid_thw, merge_size, device)
    # The size of each run. sizes[0], one token, is for text.
    sizes = torch.cat([images.new_ones(1, 3), images, videos])
    which = (begins & is_image).cumsum(0, dtype=torch.int32) * is_image
    video = (begins & is_video).cumsum(0, dtype=torch.int32) - 1
    if frames_apart:
        video = torch.searchsorted(videos[:, 0].cumsum(0, dtype=torch.int32), video, right=True)
    if len(videos):
        which = torch.where(is_video, video + (1 + len(images)), which)
    if device.type == "cpu":
        _check_runs("image", is_image, begins, bounds, images)
        runs = videos
        if frames_apart:
            runs = videos.repeat_interleave(videos[:, 0], 0)
            runs[:, 0] = 1
        _check_runs("video", is_video, begins, bounds, runs)
    height, width = sizes[:, 1].index_select(0, which), sizes[:, 2].index_select(0, which)

    # A text token advances the position by 1, and a vision run by max(height, width) at its first token.
    extent = torch.maximum(height, width)
    advance = extent * (begins | ~is_vision)
    if kept is not None:
        advance *= kept
    total = torch.zeros(num + 1, dtype=torch.int32, device=device)
    torch.cumsum(advance, 0, dtype=torch.int32, out=total[1:])
    base = total[1:] - extent - total[bounds[:-1]].index_select(0, sequence)

    index = torch.arange(num, dtype=torch.int32, device=device)
    rest = (index - torch.where(begins, index, 0).cummax(0).values) * is_vision
    frame = rest.div(height * width, rounding_mode="trunc")
    rest -= frame * height * width
    row = rest.div(width, rounding_mode="trunc")
    if tokens_per_second is not None and len(videos):
        seconds = [1.0] * len(videos) if second_per_grid_ts is None else second_per_grid_ts
        seconds = as_tensor("second_per_grid_ts", seconds, "cpu", torch.float64)
        if seconds.dim() != 1:
            raise ValueError(f"second_per_grid_ts must be one number per video, ({len(videos)},), got {tuple(seconds.shape)}")
        interval = (tokens_per_second * seconds).float().to(device, non_blocking=True)
        frame = torch.where(is_video, (frame * interval[video.clamp(min=0)]).int(), frame)
    positions = torch.stack([frame, row, rest - row * width]) + base
    if kept is not None:
        positions *= kept

    last = torch.full((len(lengths),), -1, dtype=torch.int32, device=device)
    last.scatter_reduce_(0, sequence, positions.amax(0), "amax")
    count = lengths if kept is None else kept.view(shape).sum(1)
    return MropePositions(positions.long().view(3, *shape), (last + 1 - count)[:, None])
