"""Position ids of prompts, and of the segments of trees along their paths."""

import inspect
from typing import NamedTuple

import torch
import transformers
from torch.nn.functional import pad
from transformers import PreTrainedModel

from vlmkernels.models.families import family_of
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.ops.mrope_positions import mrope_positions
from vlmkernels.ops.tree_attention import TreeLayout

# The model inputs, besides tokens, that position ids depend on.
POSITION_INPUTS = (
    *("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids"),
    *("target_sizes", "target_sizes_videos"),
)


class SegmentPositions(NamedTuple):
    """The positions of S segments of L tokens.

    Attributes:
        position_ids: (S, L) or, with M-RoPE, (3, S, L) int64: the positions of each segment as if it were a whole sequence.
        advance: (S,) int64, by how much the positions of the children of a segment are larger than its own.
    """

    position_ids: torch.Tensor
    advance: torch.Tensor


def prompt_positions(model: PreTrainedModel, prompts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the position ids of padded prompts.

    Args:
        model: a transformers model without adapters.
        prompts: model inputs of P prompts, input_ids and attention_mask (P, S).

    Returns:
        (P, S) int64, or (3, P, S) for prompts with images in models with M-RoPE.

    Raises:
        NotImplementedError: the model's own function computes the positions and does not accept one of these inputs.
    """
    mask, rope_index = prompts["attention_mask"], getattr(model.base_model, "get_rope_index", None)
    family = family_of(model.config)
    if rope_index is None or not prompts.keys() & set(POSITION_INPUTS):
        return (mask.long().cumsum(-1) - 1).clamp(min=0) + family.first_position
    # transformers versions round the seconds per frame differently, so positions of timed videos come from the model.
    timed = "second_per_grid_ts" in family.inputs and "video_grid_thw" in prompts
    if family.frames_apart is not None and not timed:
        grids = (prompts.get(name) for name in ("image_grid_thw", "video_grid_thw"))
        merge_size = model.config.vision_config.spatial_merge_size
        types, apart = prompts["mm_token_type_ids"], family.frames_apart
        return mrope_positions(types, *grids, attention_mask=mask, merge_size=merge_size, frames_apart=apart).position_ids
    accepted = inspect.signature(rope_index).parameters
    needed = prompts.keys() & set(POSITION_INPUTS) - {"mm_token_type_ids"}  # a function that does not accept it works without
    if unknown := needed - accepted.keys():
        raise NotImplementedError(
            f"model must compute position ids from {', '.join(sorted(unknown))}, got {type(model).__name__} of transformers "
            f"{transformers.__version__}, whose get_rope_index does not accept it"
        )
    inputs = {name: x for name, x in prompts.items() if name in accepted and name not in ("input_ids", "attention_mask")}
    positions: torch.Tensor = rope_index(prompts["input_ids"], attention_mask=mask, **inputs)[0]
    return positions


def segment_positions(model: PreTrainedModel, segments: dict[str, torch.Tensor]) -> SegmentPositions:
    """Return the positions of each segment by itself, and where the tokens after it continue.

    After text and images, that is the largest position + 1. After videos it can be a smaller one in models whose time positions
    grow faster than one per frame: then it is the position that ``get_rope_index`` gives to text after the video.

    Args:
        model: see ``prompt_positions``.
        segments: model inputs of S segments, padded on either side. Segments may have no tokens.
    """
    # A token of text after each segment has the position at which the path continues.
    family = family_of(model.config)
    text = next(token for token in range(3) if token not in (family.image_token_id, family.video_token_id))
    values = {"input_ids": text, "attention_mask": 1, "mm_token_type_ids": 0}
    extended = {name: pad(segments[name], (0, 1), value=value) for name, value in values.items() if name in segments}
    positions = prompt_positions(model, segments | extended)
    following = positions[..., -1] if positions.dim() == 2 else positions[..., -1].amax(0)
    return SegmentPositions(positions[..., :-1], following - family.first_position)


def unrolled_positions(model: PreTrainedModel, segments: ModelInputs, layout: TreeLayout, order: torch.Tensor) -> torch.Tensor:
    """Return the positions of segments in their paths from a copy of each path, for families without ``relative_positions``.

    Args:
        model: see ``prompt_positions``.
        segments: S segments of L tokens, padded on either side.
        layout: the layout of their pack.
        order: (T,) int64 on the CPU, the place in the S * L tokens of each token of the pack.

    Returns:
        (S * L,) or (axes, S * L) int64.

    Raises:
        ValueError: the positions of a segment differ between paths.
    """
    places = order.split(layout.lengths)
    names = [name for name in segments.inputs if segments.family.axis(name) == "token"]
    result = torch.empty(0)
    known = torch.zeros(segments.inputs["input_ids"].numel(), dtype=torch.bool)
    for leaf in sorted({*range(len(places))} - {*layout.parents}):
        path = layout.path(leaf)
        place = torch.cat([places[segment] for segment in path])
        if not len(place):
            continue
        index = place.to(segments.inputs["input_ids"].device)
        tokens = {name: segments.inputs[name].flatten()[index].unsqueeze(0) for name in names}
        positions = prompt_positions(model, segments.select(torch.tensor(path)).inputs | tokens).squeeze(-2)
        if not known.any():
            result = positions.new_zeros(*positions.shape[:-1], len(known))
        seen = known[place].to(index.device)
        if not torch.equal(result[..., index[seen]], positions[..., seen]):
            raise ValueError(
                "segments must have the same position ids in all paths, got others for an ancestor of segment "
                f"{leaf} than in earlier paths"
            )
        result[..., index] = positions
        known[place] = True
    return result


def path_starts(layout: TreeLayout, advance: torch.Tensor) -> torch.Tensor:
    """Return for each segment the sum of ``advance``, (S,), over its ancestors: (S,)."""
    count = len(layout.parents)
    ancestors = [layout.path(segment)[:-1] for segment in range(count)]
    depth = max(layout.depths, default=0)
    table = torch.tensor([[*path, *[count] * (depth - len(path))] for path in ancestors], dtype=torch.int64)
    return pad(advance, (0, 1))[table.view(count, depth).to(advance.device, non_blocking=True)].sum(1)


def check_continuous(position_ids: torch.Tensor, layout: TreeLayout) -> None:
    """Raise ValueError if the positions of a segment do not continue those of its parent.

    A segment must begin at the largest position of its path + 1, or at the one after the last token of its path: both are in
    use after videos (see ``segment_positions``).

    Args:
        position_ids: (axes, T) int64 on the CPU, of the tokens of a pack.
        layout: the layout of the pack.
    """
    largest: list[int] = []
    last: list[int] = []
    for segment, (start, length, parent) in enumerate(zip(layout.starts, layout.lengths, layout.parents, strict=True)):
        before = (largest[parent], last[parent]) if parent >= 0 else (-1, -1)
        own = position_ids[:, start : start + length]
        if length and before[0] >= 0 and (own[:, 0].unique().tolist() not in ([before[0] + 1], [before[1] + 1])):
            raise ValueError(
                f"position_ids must continue the path of each segment: segment {segment} must begin at {before[0] + 1}, the "
                f"largest position of its path + 1, got {own[:, 0].tolist()}"
            )
        largest.append(max(before[0], int(own.max())) if length else before[0])
        # The time positions of images and videos, on the first axis, do not count.
        last.append(int(own[len(own) > 1 :, -1].max()) if length else before[1])
