"""Kimi K2.5."""

import transformers as tf
from packaging.version import Version

from .base import MIXED, TEXT, TOWER, Case, Sample, token_id, tokenizer

TOKENS = {"image": "<|media_pad|>", "video": "<|kimi_k25_video_placeholder|>"}
SIZES = {"patch_size": 7, "merge_size": 2}
# Videos of up to three chunks of two frames; the last chunk can have one frame.
VIDEOS = (Sample(videos=((5, 28, 28),)), Sample(((56, 28),), ((2, 28, 56), (4, 28, 14))))


def kimi_k25():
    text = {name: size for name, size in TEXT.items() if name != "head_dim"}
    config = tf.Kimi_K25Config(
        vision_config={**TOWER, "patch_size": 7, "pos_emb_height": 8, "pos_emb_width": 8},
        text_config={
            **{"model_type": "deepseek_v3", **text, "num_key_value_heads": 4},
            **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
            **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
            **{"n_group": 1, "topk_group": 1, "n_shared_experts": 1},
        },
        projection_hidden_size=16,
        **{f"{name}_token_id": token_id(token) for name, token in TOKENS.items()},
        vision_start_token_id=token_id("<|media_begin|>"),
        vision_end_token_id=token_id("<|media_end|>"),
    )
    images, videos = tf.Kimi_K25ImageProcessor(**SIZES), tf.Kimi_K25VideoProcessor(**SIZES, temporal_patch_size=2)
    processor = tf.Kimi_K25Processor(images, tokenizer(), videos)
    image = f"<|media_begin|>image<|media_content|>{TOKENS['image']}<|media_end|>"
    # In transformers 5.17 the model counts the tokens of videos wrongly, and raises an error.
    samples = MIXED + VIDEOS if Version(tf.__version__) >= Version("5.24") else MIXED
    return Case(tf.Kimi_K25ForConditionalGeneration(config), processor, image, samples, TOKENS["video"])
