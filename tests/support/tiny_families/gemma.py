"""Models with a Gemma decoder."""

import transformers as tf

from .base import MIXED, TEXT, Case, siglip, token_id, tokenizer


def gemma3():
    config = tf.Gemma3Config(
        vision_config=siglip(56),
        text_config={**TEXT, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        mm_tokens_per_image=4,
        boi_token_index=token_id("<start_of_image>"),
        eoi_token_index=token_id("<end_of_image>"),
        image_token_index=token_id("<image_soft_token>"),
    )
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    crops = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 14, "pan_and_scan_max_num_crops": 2}
    crops["pan_and_scan_min_ratio_to_activate"] = 1.2
    images = tf.Gemma3ImageProcessor(size={"height": 56, "width": 56}, **crops)
    processor = tf.Gemma3Processor(images, tokenizer(**named), image_seq_length=4)
    processor.images_kwargs = crops
    return Case(tf.Gemma3ForConditionalGeneration(config), processor, "<start_of_image>", MIXED)


def paligemma():
    images = tf.SiglipImageProcessor(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    processor = tf.PaliGemmaProcessor(images, tokenizer(image_token="<image>"))
    config = tf.PaliGemmaConfig(
        vision_config={**siglip(), "projection_dim": 32},
        text_config={"model_type": "gemma", **TEXT, "vocab_size": len(processor.tokenizer)},
        image_token_index=token_id("<image>"),
        projection_dim=32,
    )
    return Case(tf.PaliGemmaForConditionalGeneration(config), processor, "<image>", MIXED)
