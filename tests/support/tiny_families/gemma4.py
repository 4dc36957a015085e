"""Gemma 4."""

import inspect

import transformers as tf

from .base import OF_TWO_FRAMES, TEXT, TOWER, WITH_VIDEOS, Case, token_id, tokenizer

TOKENS = {
    "image": "<|image|>",
    "boi": "<|image>",
    "eoi": "<image|>",
    "audio": "<|audio|>",
    "boa": "<|audio>",
    "eoa": "<audio|>",
}
SIZES = {"patch_size": 7, "pooling_kernel_size": 2}
CAPPED = {"final_logit_softcapping": 30.0}
LAYERS = ["sliding_attention", "full_attention"]


def _gemma4(prefix: str, vision: dict, **text) -> Case:
    names = {name: "eoa_token_index" if name == "eoa" else f"{name}_token_id" for name in TOKENS}
    config = getattr(tf, f"{prefix}Config")(
        text_config={**TEXT, "sliding_window": 8, "layer_types": LAYERS, "global_head_dim": 16, **CAPPED, **text},
        vision_config={**SIZES, **vision},
        video_token_id=token_id("<|video|>"),
        **{names[name]: token_id(token) for name, token in TOKENS.items()},
    )
    processors = [getattr(tf, f"{prefix}{kind}Processor") for kind in ("Image", "Video")]
    for processor in processors:
        inspect.getmodule(processor)._SUPPORTED_SOFT_TOKENS = (16, 70)  # the fewest tokens of an image are otherwise 70
    images, videos = (processor(max_soft_tokens=16, **SIZES) for processor in processors)
    words = tokenizer(**{f"{name}_token": token for name, token in TOKENS.items()})
    processor = getattr(tf, f"{prefix}Processor")(tf.Gemma4AudioFeatureExtractor(), images, words, videos)
    # Older versions of transformers, such as 5.17, stack the frames of videos.
    samples = WITH_VIDEOS if "num_frames_per_video" in videos.model_input_names else OF_TWO_FRAMES
    model = getattr(tf, f"{prefix}ForConditionalGeneration")(config)
    return Case(model, processor, TOKENS["image"], samples, "<|video|>")


VISION = {**TOWER, "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 32}


def gemma4():
    """Like gemma-4-26B-A4B: image tokens attend in both directions in sliding layers, keys are values in full layers."""
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
    shared = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
    off = {"hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision"}
    return _gemma4("Gemma4", VISION, **experts, **shared, **off)


def gemma4_ple():
    """Like gemma-4-E2B: causal, with inputs per layer, and keys and values of the last layers from earlier layers."""
    layers = {"num_hidden_layers": 4, "layer_types": 2 * LAYERS, "num_kv_shared_layers": 2, "use_double_wide_mlp": True}
    return _gemma4("Gemma4", VISION, **layers, hidden_size_per_layer_input=16, vocab_size_per_layer_input=TEXT["vocab_size"])


def gemma4_unified():
    """Like gemma-4-12B: without a vision tower, and image tokens attend in both directions in all layers."""
    vision = {"mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 32}
    return _gemma4("Gemma4Unified", vision, sliding_window=16)
