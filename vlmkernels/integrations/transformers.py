"""transformers' models on this package's attention, and its processors on this package's images.

Importing this module registers the attention::

    from vlmkernels.integrations.transformers import use_varlen_vision
    model = AutoModelForImageTextToText.from_pretrained(path, attn_implementation="vlmkernels")
    use_varlen_vision(model)  # where its vision tower packs patches: Qwen2-VL to Qwen3-VL, GLM-4V, Pixtral

With the first line the model takes, beside what it takes with "sdpa", packs of groups (``group_layout`` of ``pack_groups``) and
packed sequences (``cu_seq_lens_q``, ``cu_seq_lens_k``, ``max_length_q`` and ``max_length_k``, as of transformers'
``DataCollatorWithFlattening(return_flash_attn_kwargs=True)``), on any device and without flash-attn. With the second the vision
tower attends to all images and windows in one call, instead of one call for each: it hands on packed sequences to names with
"flash" in them alone, which ``from_pretrained`` would look for in flash-attn.
"""

from vlmkernels.models.attention import use_group_attention, use_varlen_vision
from vlmkernels.models.group import pack_groups, prompt_positions
from vlmkernels.models.image_processor import FastImageProcessor, with_fast_images

__all__ = [
    "FastImageProcessor",
    "pack_groups",
    "prompt_positions",
    "use_group_attention",
    "use_varlen_vision",
    "with_fast_images",
]
