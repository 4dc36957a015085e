"""The vision tower of a model on the ops of this package, as far as its family lets it."""

import torch
from transformers import PreTrainedModel

from vlmkernels.models.attention import use_varlen_vision
from vlmkernels.models.families import family_of
from vlmkernels.models.image_processor import FastImageProcessor
from vlmkernels.models.patch_embed import fold_patch_embed, patch_embeds
from vlmkernels.models.rotary import use_fused_rotary


def use_vision_ops(model: PreTrainedModel, processor) -> dict[str, dict]:
    """Let a tower that packs patches (Qwen2-VL to Qwen3.5-VL, GLM-4V) attend by ``varlen_attention``, turn its queries and keys
    by ``rotary`` and, behind a ``FastImageProcessor``, take pixels in place of normalised rows; other models stay as they are.

    No parameter changes, nor its name, and the model goes on to take what its own processor makes. Changed in place.

    Returns:
        Further arguments of the processor's calls: with them its rows of still images are pixels, uint8, each once.
    """
    pixels = family_of(model.config).inputs.get("pixel_values")
    if pixels is None or pixels.axis != "image_patch":
        return {}
    use_varlen_vision(model)
    use_fused_rotary(model.base_model.visual)
    images = processor.image_processor
    fast = isinstance(images, FastImageProcessor) and images.do_rescale and images.do_normalize
    if not fast or not patch_embeds(model):
        return {}
    mean, std = (torch.tensor(x).expand(3).tolist() for x in (images.image_mean, images.image_std))
    fold_patch_embed(model, mean=mean, std=std, rescale=images.rescale_factor, stills_only=True)
    return {"images_kwargs": {"do_rescale": False, "do_normalize": False, "temporal_patch_size": 1}}
