"""Molmo 2."""

import transformers as tf

from .base import MIXED, TEXT, TOWER, Case, Sample, token_id, tokenizer

SIZES = {"patch_size": 7, "pooling_size": [2, 2], "size": {"height": 28, "width": 28}}


def _molmo2(samples: tuple[Sample, ...]) -> Case:
    heads = {"num_key_value_heads": 2, "head_dim": 8}
    config = tf.Molmo2Config(
        vision_config={**TOWER, **heads, "image_size": [28, 28], "patch_size": 7},
        adapter_config={**TOWER, **heads, "vision_feature_layer": [0, 1], "text_hidden_size": 32},
        text_config={**TEXT, "additional_vocab_size": 0},
        image_patch_id=token_id("<im_patch>"),
        image_start_token_id=token_id("<im_start>"),
        low_res_image_start_token_id=token_id("<low_res_im_start>"),
        image_end_token_id=token_id("<im_end>"),
        frame_start_token_id=token_id("<frame_start>"),
        frame_end_token_id=token_id("<frame_end>"),
    )
    images = tf.Molmo2ImageProcessor(**SIZES, max_crops=3, overlap_margins=[1, 1])
    videos = tf.Molmo2VideoProcessor(**SIZES, do_rescale=True, do_normalize=True)
    processor = tf.Molmo2Processor(images, videos, tokenizer())
    return Case(tf.Molmo2ForConditionalGeneration(config), processor, "<|image|>", samples, "<|video|>")


# The model accepts only one kind of media in a batch, and its processor only one video in a sample.
def molmo2():
    return _molmo2(MIXED)


def molmo2_videos():
    return _molmo2((Sample(), Sample(videos=((4, 28, 28),)), Sample(videos=((2, 28, 56),))))
