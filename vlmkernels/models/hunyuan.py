"""HunYuan-VL: position ids that do not depend on the other samples of a batch."""

from types import MethodType

import torch
from transformers import PreTrainedModel


def number_images_per_sample(model: PreTrainedModel) -> PreTrainedModel:
    """Let HunYuan-VL number the images of each sample from 0. Other models do not change.

    The number of an image is one of the axes of its position ids. transformers (5.17 to 5.24) counts the images of the whole
    batch, so that the outputs for a sample depend on the samples before it, in sampling as in training.

    Changes ``model`` in place: the method ``get_rope_index`` of ``model.base_model``. ``undo_number_images_per_sample`` undoes
    it. A second call changes nothing, and copies of the model keep the change.

    Args:
        model: a transformers model without adapters.

    Returns:
        ``model``.
    """
    if model.config.model_type == "hunyuan_vl":
        model.base_model.get_rope_index = MethodType(_rope_index_per_sample, model.base_model)
    return model


def undo_number_images_per_sample(model: PreTrainedModel) -> PreTrainedModel:
    """Undo ``number_images_per_sample`` in ``model``, in place, and return it."""
    vars(model.base_model).pop("get_rope_index", None)
    return model


def _rope_index_per_sample(
    self: torch.nn.Module,
    input_ids: torch.Tensor,
    mm_token_type_ids: torch.Tensor,
    image_grid_thw: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call the model's ``get_rope_index`` for one sample at a time.

    Returns:
        The position ids (axes, B, S), and by how much the position after the last token exceeds its index, (B, 1).
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    grids: list[torch.Tensor | None] = [None] * len(input_ids)
    if image_grid_thw is not None:
        is_image = (mm_token_type_ids == 1) & (mask != 0)
        starts = is_image & ~torch.nn.functional.pad(is_image, (1, -1))  # each image is a run of tokens
        if (count := int(starts.sum())) != len(image_grid_thw):
            raise ValueError(f"image_grid_thw must have one row per run of image tokens, {count}, got {len(image_grid_thw)}")
        grids = [grid if len(grid) else None for grid in image_grid_thw.split(starts.sum(1).tolist())]
    get_rope_index = type(self).get_rope_index
    parts = [
        get_rope_index(self, ids[None], types[None], grid, kept[None], **kwargs)
        for ids, types, grid, kept in zip(input_ids, mm_token_type_ids, grids, mask, strict=True)
    ]
    return torch.cat([positions for positions, _ in parts], 1), torch.cat([deltas for _, deltas in parts])
