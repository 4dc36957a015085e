"""ERNIE-4.5-VL."""

import transformers as tf

from .base import TEXT, WITH_VIDEOS, Case, token_id, tokenizer


def ernie4_5_vl_moe():
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [16, 8], "moe_num_shared_experts": 1}
    named = {
        f"{kind}{part}_token": f"<|{kind.upper()}_{word}|>"
        for kind in ("image", "video")
        for part, word in (("", "PLACEHOLDER"), ("_start", "START"), ("_end", "END"))
    }
    config = tf.Ernie4_5_VLMoeConfig(
        text_config={**TEXT, "rope_parameters": rope, **experts},
        vision_config={"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32},
        **{f"{name}_id": token_id(token) for name, token in named.items()},
    )
    size = {"shortest_edge": 28 * 28, "longest_edge": 16 * 28 * 28}
    videos = tf.Ernie4_5_VLMoeVideoProcessor(size=size, draw_on_frames=False)  # the font is not part of transformers
    processor = tf.Ernie4_5_VLMoeProcessor(tf.Ernie4_5_VLMoeImageProcessor(size=size), tokenizer(**named), videos)
    block = "<|{0}_START|><|{0}_PLACEHOLDER|><|{0}_END|>"
    model = tf.Ernie4_5_VLMoeForConditionalGeneration(config)
    return Case(model, processor, block.format("IMAGE"), WITH_VIDEOS, block.format("VIDEO"))
