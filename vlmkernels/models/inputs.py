"""``ModelInputs``: the model inputs of a batch. It selects, joins and extends samples in every model family."""

from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch

from vlmkernels.models.families import AXES, Family, Input


@dataclass(frozen=True)
class ModelInputs:
    """Model inputs of B samples, with left-padded tokens. Built by ``ModelInputs.from_processor``.

    Attributes:
        inputs: the keyword arguments of the model's forward pass.
        rows: for each axis of the family's inputs, the number of rows of each sample along it: (B,) int64. On the CPU, so that
            selecting and joining samples never waits for a device.
        family: the family of the model.
        image_keys: (images,) int64 on the CPU, equal for equal images; None if unknown.
    """

    inputs: dict[str, torch.Tensor]
    rows: dict[str, torch.Tensor]
    family: Family
    image_keys: torch.Tensor | None = None

    @classmethod
    def from_processor(
        cls, inputs: dict, family: Family, num_images: torch.Tensor, num_videos: torch.Tensor | None = None
    ) -> "ModelInputs":
        """Check the output of a processor against the inputs of the family and wrap it.

        Args:
            inputs: the output of the processor.
            family: from ``family_of``.
            num_images, num_videos: (B,) int64 on the CPU, the number of images and videos of each sample. Default: no videos.

        Raises:
            ValueError: an input is unknown or missing, or has a wrong number of rows.
            TypeError: an input is not a tensor.
        """
        num_videos = torch.zeros_like(num_images) if num_videos is None else num_videos
        inputs = {name: value for name, value in inputs.items() if name not in family.unused}
        _check_names(inputs, family, num_images, num_videos)
        batch = cls(inputs, _count_rows(inputs, family, num_images, num_videos), family)
        for name, value in inputs.items():
            axis = family.axis(name)
            total, count = int(batch.rows[axis].sum()), len(to_rows(value, family.spec(name)))
            if count != total:
                raise ValueError(f"{name} must have {total} rows, one for each of: {AXES[axis]}, got {count}")
            if axis == "stack" and not batch.has(axis):
                raise ValueError(f"{name} must be absent where no sample has an image or video, got {count} rows")
        return batch

    def __len__(self) -> int:
        return len(self.rows["token"])

    @property
    def num_images(self) -> torch.Tensor:
        """The number of images of each sample, (B,) int64 on the CPU."""
        return self.rows["image"]

    def has(self, axis: str) -> bool:
        """Return whether any sample has rows along ``axis``. Image inputs are absent from a batch without images."""
        return bool((self.rows["image"] + self.rows["video"] if axis == "stack" else self.rows[axis]).any())

    def to(self, device: torch.device | str) -> "ModelInputs":
        """Move the inputs to ``device``. ``rows`` and ``image_keys`` stay on the CPU."""
        # Pageable memory is read before ``to`` returns, but a copy to the CPU must be complete.
        waits = torch.device(device).type == "cpu"
        return replace(self, inputs={name: tensor.to(device, non_blocking=not waits) for name, tensor in self.inputs.items()})

    def select(self, samples: torch.Tensor) -> "ModelInputs":
        """Return the given samples as a batch.

        Args:
            samples: (n,) int64 on the CPU, indices in any order; they may repeat.
        """
        keys = None if self.image_keys is None else self.image_keys[_row_indices(self.num_images, samples)]
        rows = {axis: counts[samples] for axis, counts in self.rows.items()}
        chosen = replace(self, inputs={}, rows=rows, image_keys=keys)
        index = {axis: _row_indices(counts, samples) for axis, counts in self.rows.items() if chosen.has(axis)}
        for name, tensor in self.inputs.items():
            if (axis := (spec := self.family.spec(name)).axis) in index:
                chosen.inputs[name] = from_rows(to_rows(tensor, spec)[index[axis].to(tensor.device, non_blocking=True)], spec)
                if target := spec.indexes:
                    counts, picked = self.rows[self.family.axis(target)], rows[self.family.axis(target)]
                    moved = (picked.cumsum(0) - picked) - (counts.cumsum(0) - counts)[samples]
                    shift = moved.repeat_interleave(rows[axis]) * self.inputs[target].shape[1]
                    chosen.inputs[name] = _shift_indices(chosen.inputs[name], shift)
        return chosen

    def originals(self) -> torch.Tensor:
        """Return, for each sample, the index of the first sample with the same inputs: (B,) int64 on the CPU.

        Padding is ignored. On a GPU this waits for the device for each pair of samples with the same tokens.
        """
        ids = self.inputs["input_ids"].masked_fill(self.inputs["attention_mask"] == 0, -1).tolist()
        rows = {name: to_rows(self.inputs[name], self.family.spec(name)) for name in self._media_axes()}
        parts = [rows[name].split(self.rows[axis].tolist()) for name, axis in self._media_axes().items()]
        return _first_equal(list(map(tuple, ids)), parts)

    def equal_images(self) -> torch.Tensor | None:
        """Return, for each image, the index of the first image with the same pixels: (images,) int64 on the CPU.

        The result can serve as ``image_keys``. It is None without images, and if the rows of an input cannot be assigned to
        images: tiles, stacks and videos.
        """
        axes = self._media_axes()
        if not axes or not {*axes.values()} <= {"image", "image_patch"}:
            return None
        sizes = {"image": [1] * int(self.num_images.sum())}
        if "image_patch" in axes.values():
            sizes["image_patch"] = self.inputs["image_grid_thw"].prod(-1).tolist()
        parts = [self.inputs[name].split(sizes[axis]) for name, axis in axes.items()]
        return _first_equal([part.shape for part in parts[0]], parts)

    def _media_axes(self) -> dict[str, str]:
        """Return the axis of each input that describes media. Indices, which depend on the batch, are left out."""
        axes = {name: self.family.axis(name) for name in self.inputs if not self.family.spec(name).indexes}
        return {name: axis for name, axis in axes.items() if axis != "token"}

    def select_images(self, name: str, images: torch.Tensor) -> torch.Tensor:
        """Return the rows of the input ``name`` that belong to the given images.

        Args:
            images: (n,) int64 on the CPU, indices of images.
        """
        tensor, axis = self.inputs[name], self.family.axis(name)
        if axis != "image" and not (axis == "image_patch" and "image_grid_thw" in self.inputs):
            raise ValueError(f"{name} must have rows that belong to one image each, got rows that count {AXES[axis]}")
        if axis == "image_patch":
            images = _row_indices(self.inputs["image_grid_thw"].cpu().prod(-1), images)
        return tensor[images.to(tensor.device, non_blocking=True)]

    def split(self, sizes: list[int]) -> list["ModelInputs"]:
        """Split into the first ``sizes[0]`` samples, the next ``sizes[1]``, and so on."""
        if sum(sizes) != len(self):
            raise ValueError(f"sizes must add up to the {len(self)} samples, got {sizes}")
        return [self.select(samples) for samples in torch.arange(len(self)).split(sizes)]

    def repeat(self, times: int) -> "ModelInputs":
        """Repeat each sample ``times`` times in a row, as ``torch.repeat_interleave`` does."""
        return self.select(torch.arange(len(self)).repeat_interleave(times))

    def trim(self) -> "ModelInputs":
        """Drop the leading columns that are padding in every sample."""
        start = int(self.inputs["attention_mask"].any(0).int().argmax())
        inputs = {name: t[:, start:] if self.family.axis(name) == "token" else t for name, t in self.inputs.items()}
        return replace(self, inputs=inputs)

    def without_last(self, count: int) -> "ModelInputs":
        """Remove the last ``count`` tokens of every sample."""
        cut = {name: t[:, :-count] if self.family.axis(name) == "token" else t for name, t in self.inputs.items()}
        return replace(self, inputs=cut)

    def append(self, ids: torch.Tensor, mask: torch.Tensor) -> "ModelInputs":
        """Append a completion to each prompt.

        Args:
            ids: (B, C) int64, the tokens.
            mask: (B, C), their attention mask.
        """
        return self._with_text(ids, mask, first=False)

    def prepend(self, ids: torch.Tensor) -> "ModelInputs":
        """Insert text tokens (B, C) int64 before the tokens of each sample, which must not be padded on the left."""
        return self._with_text(ids, torch.ones_like(ids), first=True)

    def _with_text(self, ids: torch.Tensor, mask: torch.Tensor, *, first: bool) -> "ModelInputs":
        new, inputs = text_columns(ids, mask, self.family), dict(self.inputs)
        for name, tensor in self.inputs.items():
            if self.family.axis(name) == "token":
                columns = [tensor, new[name].to(tensor.dtype)]
                inputs[name] = torch.cat(columns[::-1] if first else columns, dim=1)
        return replace(self, inputs=inputs)


def text_columns(ids: torch.Tensor, mask: torch.Tensor, family: Family) -> dict[str, torch.Tensor]:
    """Return the inputs of text tokens (B, C) that have a value per token; ``mask`` (B, C) is their attention mask."""
    new = {"input_ids": ids, "attention_mask": mask}
    names = [name for name, spec in family.inputs.items() if spec.axis == "token"]
    return {name: new[name] if name in new else torch.full_like(ids, family.inputs[name].completion) for name in names}


def concat(batches: list[ModelInputs], pad_token_id: int) -> ModelInputs:
    """Join the samples of several batches, padding the inputs that support it to a common size.

    Raises:
        ValueError: the batches are of different families, only some of them have an input, or an input that cannot be padded
            differs in size.
    """
    family = batches[0].family
    if any(batch.family != family for batch in batches):
        raise ValueError(f"batches must be of one family, got {', '.join(batch.family.name for batch in batches)}")
    rows = {axis: torch.cat([batch.rows[axis] for batch in batches]) for axis in batches[0].rows}
    examples = {name: tensor for batch in batches for name, tensor in batch.inputs.items()}
    inputs = {}
    for name, like in examples.items():
        parts = [_input_or_empty(batch, name, like) for batch in batches]
        if target := family.spec(name).indexes:
            counts = torch.stack([batch.rows[family.axis(target)].sum() for batch in batches])
            shifts = (counts.cumsum(0) - counts) * examples[target].shape[1]
            parts = [_shift_indices(part, shift) for part, shift in zip(parts, shifts, strict=True)]
        inputs[name] = _join(name, parts, family, pad_token_id)
    keys = [batch.image_keys for batch in batches]
    return ModelInputs(inputs, rows, family, None if any(key is None for key in keys) else torch.cat(keys))


# The inputs that tell how many patches each image, video or slice has. A family has one of them.
_PATCH_GRIDS = {"image_patch": ("image_grid_thw", "target_sizes"), "video_patch": ("video_grid_thw", "target_sizes_videos")}


def _check_names(inputs: dict, family: Family, num_images: torch.Tensor, num_videos: torch.Tensor) -> None:
    for name, value in inputs.items():
        family.axis(name)  # raises for an unknown input
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    for name in ("input_ids", "attention_mask"):
        if name not in inputs:
            raise ValueError(f"inputs must have {name}, got {', '.join(inputs)}")
    for name, counts in {"pixel_values": num_images, "pixel_values_videos": num_videos}.items():
        if name in family.inputs and counts.any() and name not in inputs:
            raise ValueError(f"inputs must have {name} for the {counts.sum()} images or videos, got {', '.join(inputs)}")


def _count_rows(
    inputs: dict[str, torch.Tensor], family: Family, num_images: torch.Tensor, num_videos: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the number of rows (B,) of each sample along every axis of the family's inputs."""
    one = torch.ones_like(num_images)
    rows = {"token": one, "stack": one, "image": num_images, "video": num_videos, "illustrated": num_images.clamp(max=1)}
    rows["image_token"] = torch.zeros_like(num_images)  # until features replace pixels
    axes = {spec.axis for spec in family.inputs.values()}
    if "image_token" in axes:
        rows["image_token"] = _count_tokens(inputs, family.image_token_id)
    if "tile" in axes:
        rows["tile"] = _count_by_tokens(inputs, "pixel_values", "spatial_shapes", family.image_token_id)
    if "chunk" in axes:
        rows["chunk"] = _count_by_tokens(inputs, "video_grid_thw", "video_grid_thw", family.video_token_id)
    if "crop" in axes:
        rows["crop"] = _count_parts(inputs, "image_num_crops", num_images)
    if "frame" in axes:
        sizes = next((name for name in ("num_frames_per_video", "video_grids") if name in inputs), None)
        # Older versions of transformers, such as 5.17, stack the frames of a video of Gemma 4 in one row.
        rows["frame"] = num_videos if sizes is None else _count_parts(inputs, sizes, num_videos)
    if "image_slice" in axes:
        rows["image_slice"] = _count_by_tokens(inputs, "target_sizes", "target_sizes", family.image_token_id)
        rows["video_slice"] = _count_by_tokens(inputs, "target_sizes_videos", "target_sizes_videos", family.video_token_id)
    for axis, grids in _PATCH_GRIDS.items():
        if axis in axes:
            grid = next(name for name in grids if name in family.inputs)
            rows[axis] = _count_parts(inputs, grid, rows[family.axis(grid)])
    return rows


def _count_parts(inputs: dict[str, torch.Tensor], sizes: str, counts: torch.Tensor) -> torch.Tensor:
    """Return the number of patches, crops or frames (B,) of each sample.

    Args:
        sizes: the name of an input with a row per image or video: its grid of patches (time, height, width), or a number of
            crops or frames, possibly followed by other numbers.
        counts: (B,) int64, the number of these rows of each sample.
    """
    if sizes not in inputs:
        return torch.zeros_like(counts)
    if len(inputs[sizes]) != counts.sum():
        raise ValueError(f"{sizes} must have one row per image or video, {counts.sum()}, got {len(inputs[sizes])}")
    values = inputs[sizes].cpu()
    is_grid = any(sizes in grids for grids in _PATCH_GRIDS.values())
    return _segment_sums(values.prod(-1) if is_grid else values.view(len(values), -1)[:, 0], counts)


def _count_tokens(inputs: dict[str, torch.Tensor], token: int | None) -> torch.Tensor:
    return (inputs["input_ids"] == token).sum(1).cpu()


def _count_by_tokens(inputs: dict[str, torch.Tensor], name: str, shapes: str, token: int | None) -> torch.Tensor:
    """Return the number of rows (B,) of the input ``name`` of each sample.

    Processors do not return this number. But the numbers of tokens of the rows are in proportion to their height times width,
    the last two columns of the input ``shapes``; in families without this input all rows have the same number of tokens.
    """
    tokens = _count_tokens(inputs, token)
    total = len(inputs.get(name, ()))
    sizes = inputs[shapes].cpu()[:, -2:].prod(-1) if shapes in inputs else torch.ones(total, dtype=torch.int64)
    # Compare where rows and samples end as fractions of all rows and tokens, multiplied by both totals.
    row_ends = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]) * tokens.sum()
    sample_ends = tokens.cumsum(0) * sizes.sum()
    last = torch.searchsorted(row_ends, sample_ends)
    rows = last.diff(prepend=last.new_zeros(1))
    if int(rows.sum()) != total or not torch.equal(row_ends[last], sample_ends):
        raise ValueError(
            f"{name} must have rows with the same number of tokens each, or in proportion to {shapes}, "
            f"got {total} rows for {tokens.tolist()} tokens"
        )
    return rows


def _segment_sums(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return the sum (B,) of the values of each sample: the first counts[0] of values (M,) belong to sample 0, and so on."""
    ends = counts.cumsum(0)
    total = torch.cat([values.new_zeros(1), values.cumsum(0)])
    return total[ends] - total[ends - counts]


def _row_indices(counts: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """Return the indices of the rows of ``samples``: sample i has counts[i] rows, which follow the rows of sample i - 1."""
    picked = counts[samples]
    first = (counts.cumsum(0) - counts)[samples]
    within = torch.arange(int(picked.sum())) - (picked.cumsum(0) - picked).repeat_interleave(picked)
    return first.repeat_interleave(picked) + within


def _shift_indices(values: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Add ``shift``, one per row of ``values`` or one for all, to the values that are not -1."""
    return torch.where(values < 0, values, values + shift.to(values).view(-1, 1))


def to_rows(tensor: torch.Tensor, spec: Input) -> torch.Tensor:
    """Return an input with its rows along the first axis. Patches side by side, (1, C, P, N * P), become (N, C, P, P)."""
    return tensor[0].unflatten(-1, (-1, tensor.shape[2])).movedim(2, 0) if spec.side_by_side else tensor


def from_rows(rows: torch.Tensor, spec: Input) -> torch.Tensor:
    """Undo ``to_rows``."""
    return rows.movedim(0, 2).flatten(2).unsqueeze(0) if spec.side_by_side else rows


def _first_equal(keys: list[Hashable], parts: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """Return, for each of n items, the index of the first item with the same key and equal tensors: (n,) int64.

    Args:
        keys: n keys. Only the tensors of items with the same key are compared.
        parts: several lists of n tensors.
    """
    candidates: dict[Hashable, list[int]] = {}
    result = []
    for index, key in enumerate(keys):
        earlier = candidates.setdefault(key, [])
        same = (k for k in earlier if all(torch.equal(part[k], part[index]) for part in parts))
        result.append(next(same, index))
        if result[-1] == index:
            earlier.append(index)
    return torch.tensor(result, dtype=torch.int64)


def _input_or_empty(batch: ModelInputs, name: str, like: torch.Tensor) -> torch.Tensor:
    """Return the input ``name`` of ``batch``. If the batch has no media for it, return no rows, or zeros for a stack."""
    if name in batch.inputs:
        return batch.inputs[name]
    axis = batch.family.axis(name)
    if batch.has(axis):
        raise ValueError(f"inputs must have {name} in all batches or none, got {', '.join(batch.inputs)}")
    spec = batch.family.spec(name)
    return from_rows(like.new_zeros(int(batch.rows[axis].sum()), *to_rows(like, spec).shape[1:]), spec)


def _join(name: str, parts: list[torch.Tensor], family: Family, pad_token_id: int) -> torch.Tensor:
    """Concatenate parts along their rows. Tokens are padded on the left, other axes that support padding at their end."""
    spec = family.spec(name)
    if spec.side_by_side:
        return torch.cat(parts, dim=-1)
    shapes = [tuple(part.shape[1:]) for part in parts]
    if len(set(shapes)) == 1:
        return torch.cat(parts)
    tokens = spec.axis == "token"
    for dim, sizes in enumerate(zip(*shapes, strict=True), 1):
        if len(set(sizes)) > 1 and dim not in spec.pads and not (tokens and dim == 1):
            raise ValueError(
                f"{name} must have one size along axis {dim} in batches to be joined (family {family.name}), got {sizes}"
            )
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    value = pad_token_id if name == "input_ids" else 0
    joined = parts[0].new_full((sum(map(len, parts)), *largest), value)
    for part, rows in zip(parts, joined.split([len(part) for part in parts]), strict=True):
        inside = [slice(size - n, size) if tokens else slice(n) for n, size in zip(part.shape[1:], largest, strict=True)]
        rows[(slice(None), *inside)] = part
    return joined
