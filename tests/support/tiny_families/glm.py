"""GLM-4V."""

import transformers as tf

from .base import MIXED, TEXT, Case, Sample, token_id, tokenizer


def _glm(prefix: str, samples: tuple[Sample, ...], **text) -> Case:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}
    config = getattr(tf, f"{prefix}Config")(
        text_config={**TEXT, "rope_parameters": rope, **text},
        vision_config={
            **{"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32},
            **{"image_size": 56, "patch_size": 14},
        },
        image_token_id=token_id("<|image|>"),
        video_token_id=token_id("<|video|>"),
        image_start_token_id=token_id("<|begin_of_image|>"),
        image_end_token_id=token_id("<|end_of_image|>"),
        video_start_token_id=token_id("<|begin_of_video|>"),
        video_end_token_id=token_id("<|end_of_video|>"),
    )
    size = {"shortest_edge": 2 * 28 * 28, "longest_edge": 32 * 28 * 28}
    parts = "Glm4v" if prefix == "Glm4vMoe" else prefix
    images, videos = getattr(tf, f"{parts}ImageProcessor")(size=size), getattr(tf, f"{parts}VideoProcessor")(size=size)
    processor = getattr(tf, f"{parts}Processor")(image_processor=images, tokenizer=tokenizer(), video_processor=videos)
    image = "<|begin_of_image|><|image|><|end_of_image|>"
    return Case(
        getattr(tf, f"{prefix}ForConditionalGeneration")(config),
        processor,
        image,
        samples,
        "<|begin_of_video|><|video|><|end_of_video|>",
    )


# GLM-4V has one placeholder token for images and videos, and its model accepts only one kind in a batch.
def glm4v():
    return _glm("Glm4v", MIXED)


VIDEOS = (Sample(), Sample(videos=((4, 28, 28),)), Sample(videos=((2, 28, 56), (4, 28, 28))))


def glm4v_videos():
    return _glm("Glm4v", VIDEOS)


def glm4v_moe():
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
    return _glm("Glm4vMoe", MIXED, **experts, n_group=1, topk_group=1, n_shared_experts=1)


def glm46v():
    return _glm("Glm46V", MIXED, model_type="glm4v_text")


def glm46v_videos():
    return _glm("Glm46V", VIDEOS, model_type="glm4v_text")
