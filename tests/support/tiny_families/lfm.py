"""LFM2-VL and LFM3-VL."""

import transformers as tf

from .base import MIXED, TEXT, TOWER, WITH_VIDEOS, Case, token_id, tokenizer


def lfm2_vl():
    """Its last image is cut into two tiles and an overview, which has fewer tokens than a tile."""
    config = tf.Lfm2VlConfig(
        vision_config={"model_type": "siglip2_vision_model", **TOWER, "num_patches": 16, "patch_size": 7},
        text_config={"model_type": "lfm2", **TEXT, "block_multiple_of": 8, "layer_types": ["conv", "full_attention"]},
        image_token_id=token_id("<image>"),
        projector_hidden_size=16,
    )
    tiles = {"tile_size": 56, "min_tiles": 2, "max_tiles": 2, "encoder_patch_size": 7}
    images = tf.Lfm2VlImageProcessor(**tiles, min_image_tokens=1, max_image_tokens=8, max_pixels_tolerance=1.5)
    processor = tf.Lfm2VlProcessor(images, tokenizer())
    return Case(tf.Lfm2VlForConditionalGeneration(config), processor, "<image>", MIXED)


def lfm3_vl():
    layers = {"num_hidden_layers": 3, "layer_types": ["conv", "sliding_attention", "full_attention"], "sliding_window": 8}
    config = tf.Lfm3VlConfig(
        vision_config={**TOWER, "num_key_value_heads": 2, "patch_size": 14, "layer_types": ["conv", "full_attention"]},
        text_config={"model_type": "lfm3", **TEXT, **layers, "conv_L_cache": 3},
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        projector_hidden_size=16,
    )
    size = {"shortest_edge": 28 * 28, "longest_edge": 16 * 28 * 28}
    images, videos = tf.Qwen2VLImageProcessor(size=size), tf.Qwen3VLVideoProcessor(size=size, patch_size=14)
    processor = tf.Lfm3VlProcessor(images, tokenizer(), videos)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    return Case(tf.Lfm3VlForConditionalGeneration(config), processor, image, WITH_VIDEOS, "<|video_pad|>")
