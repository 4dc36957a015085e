"""Batches of multimodal model inputs, cut and joined sample by sample as the families' table says."""

from dataclasses import dataclass, replace

import torch

from vlmkernels.models.families import AXES, Family
from vlmkernels.ops.checks import require


def _sums(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Sums (B,) of values (M,), where sample i owns the next counts[i] of them."""
    ends = counts.cumsum(0)
    total = torch.cat([values.new_zeros(1), values.cumsum(0)])
    return total[ends] - total[ends - counts]


def _patches(inputs: dict, grid: str, counts: torch.Tensor) -> torch.Tensor:
    """Patches (B,) of the images or videos that ``grid`` has one row each of."""
    if grid not in inputs:
        return torch.zeros_like(counts)
    require(len(inputs[grid]) == counts.sum(), grid, f"have one row per image or video, {counts.sum()}", len(inputs[grid]))
    return _sums(inputs[grid].cpu().prod(-1), counts)


def _tiles(inputs: dict, family: Family) -> torch.Tensor:
    """Tiles (B,): processors do not say how many a sample has, but every tile stands for the same number of image tokens."""
    tokens = (inputs["input_ids"] == family.image_token_id).sum(1).cpu()
    total = len(inputs.get("pixel_values", ()))
    per_tile = int(tokens.sum()) // max(total, 1)
    tiles = tokens // max(per_tile, 1)
    rule = f"have tiles that stand for the same number of image tokens each, where the samples have {tokens.tolist()}"
    require(int(tiles.sum()) == total and torch.equal(tiles * per_tile, tokens), "pixel_values", rule, f"{total} tiles")
    return tiles


def _index(counts: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The rows of the chosen samples, where sample i owns counts[i] rows and samples follow one another."""
    picked = counts[chosen]
    first = (counts.cumsum(0) - counts)[chosen]
    within = torch.arange(int(picked.sum())) - (picked.cumsum(0) - picked).repeat_interleave(picked)
    return first.repeat_interleave(picked) + within


def _first_equal(keys: list, parts: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """(n,) int64: the first index with the same key and the same tensors as each; parts: n of each tensor."""
    seen: dict = {}
    result = []
    for index, key in enumerate(keys):
        alike = seen.setdefault(key, [])
        same = (k for k in alike if all(torch.equal(part[k], part[index]) for part in parts))
        result.append(next(same, index))
        if result[-1] == index:
            alike.append(index)
    return torch.tensor(result, dtype=torch.int64)


@dataclass(frozen=True)
class Batch:
    """Model inputs of B samples, their tokens left-padded.

    inputs: what the model is called with. rows: for each axis of the family's inputs, (B,) int64 on the CPU, the rows that each
    sample owns along it, so that choosing and joining samples never waits for a device. image_keys: (images,) int64 on the CPU,
    equal where images are, or None. Made by ``Batch.of``.
    """

    inputs: dict[str, torch.Tensor]
    rows: dict[str, torch.Tensor]
    family: Family
    image_keys: torch.Tensor | None = None

    @classmethod
    def of(cls, inputs: dict, family: Family, num_images: torch.Tensor, num_videos: torch.Tensor | None = None) -> "Batch":
        """A processor's output, checked against the family's row: nothing unknown, no row too many, none missing.

        Args:
            inputs: a processor's output.
            family: from ``family_of``.
            num_images, num_videos: (B,) int64 on the CPU, of each sample; no videos by default.
        """
        num_videos = torch.zeros_like(num_images) if num_videos is None else num_videos
        inputs = {name: value for name, value in inputs.items() if name not in family.unused}
        used = {name: family.axis(name) for name in inputs}
        for name, value in inputs.items():
            require(isinstance(value, torch.Tensor), name, "be a tensor", type(value).__name__, TypeError)
        for name in ("input_ids", "attention_mask"):
            require(name in inputs, "inputs", f"have {name}", ", ".join(inputs))
        for name, number in {"pixel_values": num_images, "pixel_values_videos": num_videos}.items():
            if name in family.inputs and number.any():
                require(name in inputs, "inputs", f"have {name} for the {number.sum()} images or videos", ", ".join(inputs))

        one = torch.ones_like(num_images)
        rows = {"token": one, "stack": one, "image": num_images, "video": num_videos, "illustrated": num_images.clamp(max=1)}
        axes = {spec.axis for spec in family.inputs.values()}
        if "image_patch" in axes:
            rows["image_patch"] = _patches(inputs, "image_grid_thw", num_images)
            rows["video_patch"] = _patches(inputs, "video_grid_thw", num_videos)
        if "tile" in axes:
            rows["tile"] = _tiles(inputs, family)
        batch = cls(inputs, rows, family)
        for name, axis in used.items():
            rule = f"have {rows[axis].sum()} rows, one for each of: {AXES[axis]}"
            require(len(inputs[name]) == rows[axis].sum(), name, rule, len(inputs[name]))
            if axis == "stack":
                require(batch.has(axis), name, "be absent where no sample has an image or video", f"{len(inputs[name])} rows")
        return batch

    def __len__(self) -> int:
        return len(self.rows["token"])

    @property
    def num_images(self) -> torch.Tensor:
        """(B,) int64 on the CPU."""
        return self.rows["image"]

    def has(self, axis: str) -> bool:
        """Whether there is anything along an axis: inputs of images are absent from a batch without images."""
        return bool((self.rows["image"] + self.rows["video"] if axis == "stack" else self.rows[axis]).any())

    def to(self, device) -> "Batch":
        return replace(self, inputs={name: tensor.to(device) for name, tensor in self.inputs.items()})

    def select(self, samples: torch.Tensor) -> "Batch":
        """The samples at ``samples``, (n,) int64 on the CPU, in that order; indices may repeat."""
        keys = None if self.image_keys is None else self.image_keys[_index(self.num_images, samples)]
        rows = {axis: counts[samples] for axis, counts in self.rows.items()}
        chosen = replace(self, inputs={}, rows=rows, image_keys=keys)
        index = {axis: _index(counts, samples) for axis, counts in self.rows.items() if chosen.has(axis)}
        for name, tensor in self.inputs.items():
            if (axis := self.family.axis(name)) in index:
                chosen.inputs[name] = tensor[index[axis].to(tensor.device)]
        return chosen

    def originals(self) -> torch.Tensor:
        """(B,) int64 on the CPU: for each sample the first one with the same inputs, which may be itself.

        Padding is no input. On a GPU this waits for the device, once per pair of samples with the same tokens.
        """
        ids = self.inputs["input_ids"].masked_fill(self.inputs["attention_mask"] == 0, -1).tolist()
        others = {name: axis for name in self.inputs if (axis := self.family.axis(name)) != "token"}
        parts = [self.inputs[name].split(self.rows[axis].tolist()) for name, axis in others.items()]
        return _first_equal(list(map(tuple, ids)), parts)

    def equal_images(self) -> torch.Tensor | None:
        """(images,) int64 on the CPU, for ``image_keys``: the first image with the same pixels as each. None where a family's
        inputs do not tell which pixels are an image's."""
        others = {name: axis for name in self.inputs if (axis := self.family.axis(name)) != "token"}
        if not others or not {*others.values()} <= {"image", "image_patch"}:
            return None
        sizes = {"image": [1] * int(self.num_images.sum())}
        if "image_patch" in others.values():
            sizes["image_patch"] = self.inputs["image_grid_thw"].prod(-1).tolist()
        parts = [self.inputs[name].split(sizes[axis]) for name, axis in others.items()]
        return _first_equal([part.shape for part in parts[0]], parts)

    def of_images(self, name: str, images: torch.Tensor) -> torch.Tensor:
        """The rows of an input that belong to the images at ``images``, (n,) int64 on the CPU."""
        tensor, axis = self.inputs[name], self.family.axis(name)
        require(axis in ("image", "image_patch"), name, "tell which of its rows are an image's", AXES[axis])
        if axis == "image_patch":
            images = _index(self.inputs["image_grid_thw"].cpu().prod(-1), images)
        return tensor[images.to(tensor.device)]

    def split(self, sizes: list[int]) -> list["Batch"]:
        """Batches of the first sizes[0] samples, the next sizes[1], and so on."""
        require(sum(sizes) == len(self), "sizes", f"add up to the {len(self)} samples", sizes)
        return [self.select(samples) for samples in torch.arange(len(self)).split(sizes)]

    def repeat(self, times: int) -> "Batch":
        """Each sample ``times`` times in a row."""
        return self.select(torch.arange(len(self)).repeat_interleave(times))

    def trim(self) -> "Batch":
        """Without the columns that are padding in every sample."""
        start = int(self.inputs["attention_mask"].any(0).int().argmax())
        inputs = {name: t[:, start:] if self.family.axis(name) == "token" else t for name, t in self.inputs.items()}
        return replace(self, inputs=inputs)

    def append(self, ids: torch.Tensor, mask: torch.Tensor) -> "Batch":
        """Each prompt followed by a completion. ids, mask: (B, C)."""
        new, inputs = {"input_ids": ids, "attention_mask": mask}, dict(self.inputs)
        for name, tensor in self.inputs.items():
            if self.family.axis(name) == "token":
                column = new.get(name, torch.full_like(ids, self.family.inputs[name].completion))
                inputs[name] = torch.cat([tensor, column.to(tensor.dtype)], dim=1)
        return replace(self, inputs=inputs)


def concat(batches: list[Batch], pad_token_id: int) -> Batch:
    """The samples of several batches of one family as one batch, padded where its inputs know padding."""
    family = batches[0].family
    require(all(b.family == family for b in batches), "batches", "be of one family", ", ".join(b.family.name for b in batches))
    rows = {axis: torch.cat([b.rows[axis] for b in batches]) for axis in batches[0].rows}
    given = {name: tensor for batch in batches for name, tensor in batch.inputs.items()}
    inputs = {
        name: _join(name, [_part(b, name, tensor) for b in batches], family, pad_token_id) for name, tensor in given.items()
    }
    keys = [batch.image_keys for batch in batches]
    return Batch(inputs, rows, family, None if any(key is None for key in keys) else torch.cat(keys))


def _part(batch: Batch, name: str, like: torch.Tensor) -> torch.Tensor:
    """An input of a batch: no rows (of a stack, padding alone) where the batch has nothing along the input's axis."""
    axis = batch.family.axis(name)
    if name not in batch.inputs:
        require(not batch.has(axis), "inputs", f"have {name} in all batches or none", ", ".join(batch.inputs))
        return like.new_zeros(int(batch.rows[axis].sum()), *like.shape[1:])
    return batch.inputs[name]


def _join(name: str, parts: list[torch.Tensor], family: Family, pad_token_id: int) -> torch.Tensor:
    """Parts one after the other: tokens padded on the left, other axes, where padding is known, at their end."""
    spec, shapes = family.inputs[name], [tuple(part.shape[1:]) for part in parts]
    if len(set(shapes)) == 1:
        return torch.cat(parts)
    tokens = spec.axis == "token"
    for dim, sizes in enumerate(zip(*shapes, strict=True), 1):
        rule = f"have one size along axis {dim} in batches to be joined (family {family.name})"
        require(len(set(sizes)) == 1 or dim in spec.pads or (tokens and dim == 1), name, rule, sizes)
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    value = pad_token_id if name == "input_ids" else 0
    joined = parts[0].new_full((sum(map(len, parts)), *largest), value)
    for part, rows in zip(parts, joined.split([len(part) for part in parts]), strict=True):
        inside = [slice(size - n, size) if tokens else slice(n) for n, size in zip(part.shape[1:], largest, strict=True)]
        rows[(slice(None), *inside)] = part
    return joined
