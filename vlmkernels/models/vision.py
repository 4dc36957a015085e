"""``use_vision_ops``: this package's ops in the vision tower of a model."""

import warnings
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from vlmkernels.models.attention import use_varlen_vision
from vlmkernels.models.image_processor import FastImageProcessor
from vlmkernels.models.patch_embed import fold_patch_embed, patch_embeds
from vlmkernels.models.rotary import use_fused_rotary


def use_vision_ops(model: PreTrainedModel, processor: ProcessorMixin) -> dict[str, dict[str, Any]]:
    """Use ``varlen_attention``, ``rotary`` and uint8 pixels in a vision tower that packs patches::

        processor_kwargs = use_vision_ops(model, processor)
        inputs = processor(text=..., images=..., **processor_kwargs)

    Qwen2-VL to Qwen3.5-VL and GLM-4V have such towers. Other models do not change.

    Changes ``model`` in place, as ``use_varlen_vision``, ``use_fused_rotary`` and ``fold_patch_embed`` do; their docstrings say
    how to undo each. Parameters and their names stay the same, and the model still accepts the output of its own processor.

    Args:
        model: a transformers model without adapters.
        processor: its processor. Uint8 pixels need a ``FastImageProcessor`` that rescales and normalizes.

    Returns:
        Keyword arguments for calls of the processor, with which it returns still images as rows of uint8 pixels, each frame
        once. Empty if uint8 pixels are not supported.
    """
    tower = getattr(model.base_model, "visual", None)
    if tower is None:
        return {}
    use_varlen_vision(model)
    use_fused_rotary(tower)
    images = processor.image_processor
    fast = isinstance(images, FastImageProcessor) and images.do_rescale and images.do_normalize
    if not fast:
        return {}
    if not patch_embeds(model):
        warnings.warn(
            f"{type(model).__name__} has no patch_embed.proj that is a Conv3d without adapters: pixels remain floats",
            stacklevel=2,
        )
        return {}
    mean, std = (torch.tensor(x).expand(3).tolist() for x in (images.image_mean, images.image_std))
    fold_patch_embed(model, mean=mean, std=std, rescale=images.rescale_factor, stills_only=True)
    return {"images_kwargs": {"do_rescale": False, "do_normalize": False, "temporal_patch_size": 1}}
