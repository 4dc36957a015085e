"""Rows of prompts and completions, split into segments with their images where rows begin to differ."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

from vlmkernels.models.image_features import image_axes
from vlmkernels.models.inputs import ModelInputs

# Completions share an equal beginning of at least this many tokens: a shorter one is not worth a segment.
SHARED_TOKENS = 16


def tokens_per_image(batch: ModelInputs) -> list[int] | None:
    """Return the number of image tokens of each image, or None if the inputs do not tell.

    All images have the same number, or one in proportion to their patches.
    """
    is_image = _image_tokens(batch)
    counts = batch.num_images
    sizes = torch.ones(int(counts.sum()), dtype=torch.int64)
    if "image_grid_thw" in batch.inputs:
        sizes = batch.inputs["image_grid_thw"].cpu().prod(-1)
    scaled = sizes * int(is_image.sum())
    total = max(int(sizes.sum()), 1)
    if (scaled % total).any():
        return None
    tokens: list[int] = (scaled // total).tolist()
    expected = [sum(part) for part in _split(tokens, counts.tolist())]
    return tokens if expected == is_image.sum(1).tolist() else None


def single_images(batch: ModelInputs) -> ModelInputs | None:
    """Return each image of a batch as a sample that consists of its image tokens, or None if their number is unknown."""
    tokens = tokens_per_image(batch)
    if tokens is None or not tokens or _is_stacked(batch):
        return None
    mask = torch.arange(max(tokens)).flip(0) < torch.tensor(tokens).unsqueeze(1)  # left-padded
    text = {"input_ids": mask * batch.family.image_token_id, "attention_mask": mask.long()}
    text = {name: x.to(batch.inputs["input_ids"].device) for name, x in text.items()}
    media = {name: batch.inputs[name] for name in image_axes(batch)}
    return ModelInputs.from_processor(text | media, batch.family, torch.ones(len(tokens), dtype=torch.int64))


def split_rows(batch: ModelInputs, bounds: Sequence[Sequence[int]]) -> ModelInputs | None:
    """Split the rows of a batch into segments, in the order of the rows.

    Args:
        batch: B rows of L tokens, padded on either side.
        bounds: for each row, where its segments begin and where the last one ends, from 0 to L, ascending.

    Returns:
        The segments, left-padded, or None if it is unknown which images belong to which segment.
    """
    tokens = tokens_per_image(batch)
    if tokens is None or _is_stacked(batch):
        return None
    is_image = _image_tokens(batch)
    before = torch.cat([torch.zeros(len(is_image), 1, dtype=torch.int64), is_image.cumsum(1)], 1)
    counts = []
    for row, (bound, sizes) in enumerate(zip(bounds, _split(tokens, batch.num_images.tolist()), strict=True)):
        number_at = {end: number for number, end in enumerate([0, *accumulate(sizes)])}
        numbers = [number_at.get(end, -1) for end in before[row, list(bound)].tolist()]
        if -1 in numbers:
            return None  # an image is cut
        counts += [stop - start for start, stop in pairwise(numbers)]
    rows = torch.tensor([row for row, bound in enumerate(bounds) for _ in bound[1:]])
    starts, stops = torch.tensor([pair for bound in bounds for pair in pairwise(bound)]).T
    columns = stops.unsqueeze(1) - torch.arange(int((stops - starts).max())).flip(0) - 1
    inside = (columns >= starts.unsqueeze(1)).to(batch.inputs["input_ids"].device)
    places = (rows.unsqueeze(1), columns.clamp(min=0))
    inputs = {name: x[places] * inside if batch.family.axis(name) == "token" else x for name, x in batch.inputs.items()}
    return ModelInputs.from_processor(inputs, batch.family, torch.tensor(counts))


class SharedRows(NamedTuple):
    """Rows of prompts and completions, and what they share.

    Attributes:
        group: (B,) int64, for each row the first row with the same prompt.
        cuts: for each row the columns after the prompt at which it is cut, ascending: where equal beginnings end.
    """

    group: torch.Tensor
    cuts: list[list[int]]


def shared_rows(batch: ModelInputs, image_keys: torch.Tensor, prompt_length: int) -> SharedRows:
    """Find the rows with equal prompts, and where to cut completions so that equal beginnings are segments of their own.

    Args:
        batch: B rows of L tokens: left-padded prompts and right-padded completions. ``tokens_per_image`` of it is known.
        image_keys: equal for equal images; see ``ModelInputs``.
        prompt_length: the number of columns of prompts.
    """
    tokens = tokens_per_image(batch) or []
    is_image = _image_tokens(batch)
    mask = batch.inputs["attention_mask"].bool().cpu()
    ids = (
        batch.inputs["input_ids"]
        .cpu()
        .masked_scatter(is_image, -2 - image_keys.repeat_interleave(torch.tensor(tokens, dtype=torch.int64)))
    )
    ids = ids.masked_fill(~mask, -1)
    differs = ids.unsqueeze(0) != ids.unsqueeze(1)
    common = torch.where(differs.any(-1), differs.byte().argmax(-1), ids.shape[1])
    same_prompt = common >= prompt_length
    # Images are not cut, and a segment does not end with one, which the next token might continue.
    columns = torch.arange(1, ids.shape[1] + 1)
    text_ends = torch.where(is_image, 0, columns).cummax(1).values
    cuts = []
    for row, length in enumerate((prompt_length + mask[:, prompt_length:].sum(1)).tolist()):
        ends = text_ends[row, common[row][same_prompt[row]] - 1].unique().tolist()
        last, kept = prompt_length, []
        for end in ends:
            if end - last >= SHARED_TOKENS and end < length:
                last = end
                kept.append(end)
        cuts.append(kept)
    return SharedRows(same_prompt.byte().argmax(1), cuts)


def _image_tokens(batch: ModelInputs) -> torch.Tensor:
    """Return which tokens are image tokens, (B, L) bool on the CPU."""
    token = batch.family.image_token_id
    return (batch.inputs["input_ids"] == (-1 if token is None else token)).cpu()


def _is_stacked(batch: ModelInputs) -> bool:
    """Return whether the images of a sample are one row of an input."""
    return any(batch.family.axis(name) in ("stack", "illustrated") for name in batch.inputs)


def _split(values: list[int], counts: list[int]) -> list[list[int]]:
    """Split a list into parts of the given lengths."""
    return [values[end - count : end] for count, end in zip(counts, accumulate(counts), strict=True)]
