"""The inputs of each family of vision-language models, one row per family, and the functions that cut and join them.

A batch of model inputs is one dict of tensors. Each tensor's first axis counts one of three things:

    "token"  samples, and the second axis their tokens: (B, S)
    "image"  images, in the order of the samples: (num_images.sum(), ...)
    "patch"  patches, in the order of the images; image i has image_grid_thw[i].prod() of them
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Family:
    """A family's name, the ``model_type`` of its configurations, and what the first axis of each input counts."""

    name: str
    model_types: tuple[str, ...]
    axes: dict[str, str]


_TEXT = {"input_ids": "token", "attention_mask": "token"}

TEXT = Family("text", (), _TEXT)
FAMILIES = (
    Family(
        "qwen_vl",
        ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"),
        _TEXT | {"mm_token_type_ids": "token", "pixel_values": "patch", "image_grid_thw": "image"},
    ),
    Family(
        "image_rows",
        ("llava", "gemma3"),
        _TEXT | {"mm_token_type_ids": "token", "token_type_ids": "token", "pixel_values": "image"},
    ),
)


def family_of(config) -> Family:
    """The family of a model's configuration; that of text models where it has no vision part."""
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    if "vision_config" in config.sub_configs or "vision_config" in config.to_dict():
        known = ", ".join(name for family in FAMILIES for name in family.model_types)
        raise NotImplementedError(f"model_type must be one of {known} or a text model, got {config.model_type!r}")
    return TEXT


def _axis(family: Family, name: str) -> str:
    if name not in family.axes:
        raise ValueError(f"model inputs of the family {family.name} must be among {', '.join(family.axes)}, got {name!r}")
    return family.axes[name]


def _rows(sizes: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The rows of the chosen items, where item i owns sizes[i] rows and items follow one another."""
    counts = sizes[chosen]
    first = (sizes.cumsum(0) - sizes)[chosen]
    within = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return first.repeat_interleave(counts) + within


def take_samples(
    inputs: dict[str, torch.Tensor], samples: torch.Tensor, num_images: torch.Tensor, family: Family
) -> dict[str, torch.Tensor]:
    """The inputs of ``samples``, indices that may repeat. Image inputs are left out where no chosen sample has an image.

    Args:
        inputs: of B samples.
        samples: (n,) int64 on the CPU.
        num_images: (B,) int64 on the CPU, the images of each sample.
    """
    axes = {name: _axis(family, name) for name in inputs}
    index = {"token": samples, "image": _rows(num_images, samples)}
    if "patch" in axes.values():
        index["patch"] = _rows(inputs["image_grid_thw"].prod(-1).cpu(), index["image"])
    has_images = index["image"].numel() > 0
    return {
        name: tensor[index[axes[name]].to(tensor.device)]
        for name, tensor in inputs.items()
        if axes[name] == "token" or has_images
    }


def drop_padding(inputs: dict[str, torch.Tensor], family: Family) -> dict[str, torch.Tensor]:
    """Left-padded inputs without the columns that are padding in every sample."""
    start = int(inputs["attention_mask"].any(0).int().argmax())
    return {name: tensor[:, start:] if _axis(family, name) == "token" else tensor for name, tensor in inputs.items()}


def append_completions(
    inputs: dict[str, torch.Tensor], ids: torch.Tensor, mask: torch.Tensor, family: Family
) -> dict[str, torch.Tensor]:
    """Prompts followed by completions. ids, mask: (B, C); token types of a completion are 0, text."""
    new = {"input_ids": ids, "attention_mask": mask}
    joined = dict(inputs)
    for name, tensor in inputs.items():
        if _axis(family, name) == "token":
            column = new.get(name, torch.zeros_like(ids))
            joined[name] = torch.cat([tensor, column.to(tensor.dtype)], dim=1)
    return joined
