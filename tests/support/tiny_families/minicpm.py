"""MiniCPM-V."""

import transformers as tf

from .base import TEXT, TOWER, WITH_VIDEOS, Case, token_id, tokenizer
from .qwen import linear


def minicpmv4_7():
    config = tf.MiniCPMV4_7Config(
        text_config={"model_type": "qwen3_5_text", **TEXT, **linear()},
        vision_config={**TOWER, "image_size": 56, "patch_size": 7},
        insert_layer_id=0,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        image_start_id=token_id("<image>"),
        image_end_id=token_id("</image>"),
        slice_start_id=token_id("<slice>"),
        slice_end_id=token_id("</slice>"),
        newline_id=token_id("Ċ"),  # the byte 10 in the alphabet of ByteLevel
    )
    named = {
        **{"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
        **{"image_start_token": "<image>", "image_end_token": "</image>"},
        **{"slice_start_token": "<slice>", "slice_end_token": "</slice>"},
        **{"image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>"},
    }
    size = {"scale_resolution": 28, "patch_size": 7}
    images = tf.MiniCPMV4_6ImageProcessor(**size, max_slice_nums=4)
    videos = tf.MiniCPMV4_6VideoProcessor(**size, max_slice_nums=1)
    processor = tf.MiniCPMV4_7Processor(images, videos, tokenizer(**named))
    model = tf.MiniCPMV4_7ForConditionalGeneration(config)
    return Case(model, processor, "<|image_pad|>", WITH_VIDEOS, "<|video_pad|>")
