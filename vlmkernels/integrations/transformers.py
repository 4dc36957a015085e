"""This package's attention and image processor for transformers.

Importing this module registers the attention implementation "vlmkernels"::

    from vlmkernels.integrations.transformers import use_varlen_vision
    model = AutoModelForImageTextToText.from_pretrained(path, attn_implementation="vlmkernels")
    use_varlen_vision(model)  # for vision towers that pack patches: Qwen2-VL to Qwen3.5-VL, GLM-4V, Pixtral

The model then supports packs of trees (``tree_layout`` from ``pack_trees`` or ``pack_groups``) and packed sequences
(``cu_seq_lens_q``, ``cu_seq_lens_k``, ``max_length_q``, ``max_length_k``, as from
``DataCollatorWithFlattening(return_flash_attn_kwargs=True)``), on any device and without flash-attn. Packed sequences must not
be longer than a layer's sliding window, and with attention dropout each of them is a call of "sdpa". All other inputs run as
with "sdpa".

``use_varlen_vision`` runs the attention of all images and windows in one call per layer. It is a separate function because
vision towers pass packed sequences only to implementations with "flash" in their name, which ``from_pretrained`` would look for
in flash-attn.

Nothing in transformers is replaced. The docstrings of the ``use_...`` functions say what changes in the model and how to undo
it.
"""

from vlmkernels.models.attention import undo_tree_attention, use_tree_attention, use_varlen_vision
from vlmkernels.models.families import family_of
from vlmkernels.models.image_processor import FastImageProcessor, with_fast_images
from vlmkernels.models.packs import pack_groups, pack_trees
from vlmkernels.models.positions import prompt_positions

__all__ = [
    "FastImageProcessor",
    "family_of",
    "pack_groups",
    "pack_trees",
    "prompt_positions",
    "undo_tree_attention",
    "use_tree_attention",
    "use_varlen_vision",
    "with_fast_images",
]
