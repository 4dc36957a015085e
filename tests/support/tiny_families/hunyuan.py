"""HunYuan-VL."""

import transformers as tf

from vlmkernels.models.hunyuan import number_images_per_sample

from .base import MIXED, TEXT, TOWER, Case, token_id, tokenizer


def hunyuan_vl():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0, "alpha": 10.0, "mrope_section": [1] * 4}
    config = tf.HunYuanVLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={**TOWER, "out_hidden_size": 32, "patch_size": 14, "max_image_size": 56},
        image_token_id=token_id("<image_pad>"),
        im_start_id=token_id("<image_start>"),
        im_end_id=token_id("<image_end>"),
    )
    named = {"image_token": "<image_pad>", "image_start_token": "<image_start>", "image_end_token": "<image_end>"}
    images = tf.HunYuanVLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 16 * 28 * 28}, patch_size=14)
    processor = tf.HunYuanVLProcessor(images, tokenizer(**named))
    image = "<image_start><image_pad><image_end>"
    return Case(number_images_per_sample(tf.HunYuanVLForConditionalGeneration(config)), processor, image, MIXED)
