"""LLaVA and models like it: a vision tower, a projector and a text model."""

import transformers as tf

from .base import MIXED, OF_TWO_FRAMES, TEXT, TOWER, Case, siglip, token_id, tokenizer


def _clip() -> dict:
    return {"model_type": "clip_vision_model", **TOWER, "image_size": 28, "patch_size": 14, "projection_dim": 16}


def _pixtral() -> dict:
    return {"model_type": "pixtral", **TOWER, "head_dim": 8, "image_size": 112, "patch_size": 7}


def llava():
    text = {"model_type": "llama", **TEXT}
    config = tf.LlavaConfig(vision_config=_clip(), text_config=text, image_token_index=token_id("<image>"))
    images = tf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    sizes = {"patch_size": 14, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    processor = tf.LlavaProcessor(images, tokenizer(), **sizes)
    return Case(tf.LlavaForConditionalGeneration(config), processor, "<image>", MIXED)


def _pixtral_processor(merge: int) -> tf.PixtralProcessor:
    images = tf.PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 7, "width": 7})
    return tf.PixtralProcessor(images, tokenizer(), patch_size=7, spatial_merge_size=merge)


def pixtral():
    config = tf.LlavaConfig(
        vision_config=_pixtral(),
        text_config={"model_type": "mistral", **TEXT, "sliding_window": None},
        image_token_index=token_id("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return Case(tf.LlavaForConditionalGeneration(config), _pixtral_processor(1), "[IMG]", MIXED)


def mistral3():
    text = {"model_type": "mistral", **TEXT, "sliding_window": None}
    config = tf.Mistral3Config(vision_config=_pixtral(), text_config=text, image_token_index=token_id("[IMG]"))
    return Case(tf.Mistral3ForConditionalGeneration(config), _pixtral_processor(2), "[IMG]", MIXED)


PINPOINTS = [[28, 56], [56, 28], [56, 56]]


def llava_next():
    config = tf.LlavaNextConfig(
        vision_config=_clip(),
        text_config={"model_type": "mistral", **TEXT, "sliding_window": None},
        image_token_index=token_id("<image>"),
        image_grid_pinpoints=PINPOINTS,
    )
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    images = tf.LlavaNextImageProcessor(image_grid_pinpoints=PINPOINTS, **size)
    sizes = {"patch_size": 14, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    processor = tf.LlavaNextProcessor(images, tokenizer(), **sizes)
    return Case(tf.LlavaNextForConditionalGeneration(config), processor, "<image>", MIXED)


def llava_onevision():
    config = tf.LlavaOnevisionConfig(
        vision_config=siglip(),
        text_config={"model_type": "qwen2", **TEXT},
        image_token_index=token_id("<image>"),
        video_token_index=token_id("<video>"),
        image_grid_pinpoints=PINPOINTS,
    )
    size = {"size": {"height": 28, "width": 28}}
    images = tf.LlavaOnevisionImageProcessor(image_grid_pinpoints=PINPOINTS, **size)
    processor = tf.LlavaOnevisionProcessor(
        images,
        tokenizer(),
        tf.LlavaOnevisionVideoProcessor(**size),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
    )
    return Case(tf.LlavaOnevisionForConditionalGeneration(config), processor, "<image>", OF_TWO_FRAMES, "<video>")


def internvl():
    config = tf.InternVLConfig(
        vision_config={**TOWER, "image_size": [28, 28], "patch_size": [7, 7]},
        text_config={"model_type": "qwen2", **TEXT},
        image_token_id=token_id("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    named = {"start_image_token": "<img>", "end_image_token": "</img>"}
    named |= {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    size = {"size": {"height": 28, "width": 28}}
    images, videos = tf.GotOcr2ImageProcessor(max_patches=4, **size), tf.InternVLVideoProcessor(**size)
    processor = tf.InternVLProcessor(images, tokenizer(**named), videos, image_seq_length=4)
    return Case(tf.InternVLForConditionalGeneration(config), processor, "<IMG_CONTEXT>", OF_TWO_FRAMES, "<video>")


def _idefics(prefix: str) -> tf.PreTrainedModel:
    config = getattr(tf, f"{prefix}Config")(
        vision_config={**TOWER, "image_size": 28, "patch_size": 7},
        text_config={"model_type": "llama", **TEXT},
        image_token_id=token_id("<image>"),
        scale_factor=2,
    )
    return getattr(tf, f"{prefix}ForConditionalGeneration")(config)


def idefics3():
    images = tf.Idefics3ImageProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    return Case(_idefics("Idefics3"), tf.Idefics3Processor(images, tokenizer(), image_seq_len=4), "<image>", MIXED)


def smolvlm():
    """Uses the processor of Idefics3, which treats images in the same way: its own needs num2words."""
    return Case(_idefics("SmolVLM"), idefics3().processor, "<image>", MIXED)


def aya_vision():
    config = tf.AyaVisionConfig(
        vision_config={**siglip(56), "vision_use_head": False},
        text_config={
            **{"model_type": "cohere2", **TEXT, "sliding_window": 8},
            "layer_types": ["sliding_attention", "full_attention"],
        },
        image_token_index=token_id("<|IMG_PATCH|>"),
    )
    images = tf.GotOcr2ImageProcessor(max_patches=4, size={"height": 56, "width": 56})
    processor = tf.AyaVisionProcessor(images, tokenizer(), patch_size=14, img_size=56, downsample_factor=2)
    return Case(tf.AyaVisionForConditionalGeneration(config), processor, "<image>", MIXED)


def ovis2():
    config = tf.Ovis2Config(
        vision_config={**TOWER, "image_size": 28, "patch_size": 7, "hidden_stride": 2, "vocab_size": 40},
        text_config={"model_type": "qwen2", **TEXT},
        image_token_id=token_id("<IMG_ATOM>"),
        visual_indicator_token_ids=[*map(token_id, ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"))],
        vocab_size=TEXT["vocab_size"],
        hidden_size=TEXT["hidden_size"],
    )
    images = tf.Ovis2ImageProcessor(size={"height": 28, "width": 28}, crop_to_patches=True, max_patches=4)
    processor = tf.Ovis2Processor(images, tokenizer(), image_seq_length=4)
    return Case(tf.Ovis2ForConditionalGeneration(config), processor, "<image>", MIXED)
