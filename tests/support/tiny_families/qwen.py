"""Qwen2-VL to Qwen3.5-VL, and Qwen3-Next."""

import transformers as tf

from .base import TEXT, WITH_VIDEOS, Case, Sample, token_id, tokenizer


def _mrope(*section: int) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section)}}


def _qwen(prefix: str, text: dict, vision: dict, size: dict, processor: str, samples=WITH_VIDEOS) -> Case:
    config = getattr(tf, f"{prefix}Config")(
        text_config={**TEXT, **text},
        vision_config={"depth": 2, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32, **vision},
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )
    images = tf.Qwen2VLImageProcessor(size=size, patch_size=vision.get("patch_size", 14))
    videos = tf.Qwen3VLVideoProcessor if processor == "Qwen3VLProcessor" else tf.Qwen2VLVideoProcessor
    videos = videos(size=size, patch_size=vision.get("patch_size", 14))
    processor = getattr(tf, processor)(image_processor=images, tokenizer=tokenizer(), video_processor=videos)
    block = "<|vision_start|><|{}_pad|><|vision_end|>"
    model = getattr(tf, f"{prefix}ForConditionalGeneration")(config)
    return Case(model, processor, block.format("image"), samples, block.format("video"))


PIXELS = {"shortest_edge": 28 * 28, "longest_edge": 16 * 28 * 28}
PIXELS_3 = {"shortest_edge": 32 * 32, "longest_edge": 16 * 32 * 32}


def qwen2_vl():
    vision = {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    return _qwen("Qwen2VL", _mrope(1, 1, 2), vision, PIXELS, "Qwen2VLProcessor")


def qwen2_5_vl():
    vision = {"intermediate_size": 32, "fullatt_block_indexes": [1]}
    return _qwen("Qwen2_5_VL", _mrope(1, 1, 2), vision, PIXELS, "Qwen2_5_VLProcessor")


VISION_3 = {"intermediate_size": 32, "num_position_embeddings": 16, "patch_size": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def qwen3_vl():
    vision = {**VISION_3, "deepstack_visual_indexes": [0]}
    return _qwen("Qwen3VL", _mrope(2, 1, 1), vision, PIXELS_3, "Qwen3VLProcessor")


def qwen3_vl_moe():
    vision = {**VISION_3, "deepstack_visual_indexes": [0]}
    return _qwen("Qwen3VLMoe", {**_mrope(2, 1, 1), **EXPERTS}, vision, PIXELS_3, "Qwen3VLProcessor")


def linear(**more) -> dict:
    text = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
    return {**text, "rope_parameters": rope, "layer_types": ["linear_attention", "full_attention"], **more}


def qwen3_5():
    return _qwen("Qwen3_5", linear(), VISION_3, PIXELS_3, "Qwen3VLProcessor")


def qwen3_5_moe():
    more = {**EXPERTS, "shared_expert_intermediate_size": 16}
    return _qwen("Qwen3_5Moe", linear(**more), VISION_3, PIXELS_3, "Qwen3VLProcessor")


def qwen3_next():
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    more = {**EXPERTS, "shared_expert_intermediate_size": 16, "rope_parameters": rope}
    config = tf.Qwen3NextConfig(**TEXT, **linear(**more))
    return Case(tf.Qwen3NextForCausalLM(config), tokenizer(), "", (Sample(),) * 4)
