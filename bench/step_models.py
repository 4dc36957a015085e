"""Models with random weights for the benchmarks of training, decoding and packs of trees."""

import harness
import torch
from support import tiny
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

# Models of test_training and bench_decode.py, with the work of a training step. "3b" has the shape of Qwen2.5-VL-3B.
MODELS = {
    "tiny": {
        "text": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
                 "intermediate_size": 128, "vocab_size": 512},
        "vision": {"hidden_size": 32, "depth": 2, "num_heads": 2, "intermediate_size": 64, "fullatt_block_indexes": [1]},
        "work": {"generations": 4, "tokens": 16, "side": 112},
    },
    "0.5b": {
        "text": {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
                 "intermediate_size": 4864, "vocab_size": 151936},
        "vision": {"hidden_size": 1280, "depth": 8, "num_heads": 16, "intermediate_size": 3420, "fullatt_block_indexes": [7]},
        "work": {"generations": 8, "tokens": 256, "side": 980},
    },
    "3b": {
        "text": {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
                 "intermediate_size": 11008, "vocab_size": 151936},
        "vision": {"hidden_size": 1280, "depth": 32, "num_heads": 16, "intermediate_size": 3420,
                   "fullatt_block_indexes": [7, 15, 23, 31]},
        "work": {"generations": 8, "tokens": 256, "side": 980},
    },
}  # fmt: skip

SIZES = {"width": 256, "layers": 6, "depth": 4, "vocab": 32000}  # of make_model, for steps with sampling on the CPU


def _config(text: dict, vision: dict) -> Qwen2_5_VLConfig:
    config = tiny.vlm().config.to_dict()
    config["text_config"] |= text
    text = config["text_config"]
    head = text["hidden_size"] // text["num_attention_heads"]
    text |= {
        "max_position_embeddings": 8192, "layer_types": ["full_attention"] * text["num_hidden_layers"],
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6, "mrope_section": [head // 8, head * 3 // 16, head * 3 // 16],
        },
    }  # fmt: skip
    config["vision_config"] |= vision | {"out_hidden_size": text["hidden_size"]}
    torch.manual_seed(0)
    return Qwen2_5_VLConfig(**config)


def random_model(name: str) -> Qwen2_5_VLForConditionalGeneration:
    """A model of ``MODELS``, created on its device; bf16 on a GPU, fp32 on the CPU."""
    config = _config(MODELS[name]["text"], MODELS[name]["vision"])
    with torch.device(harness.DEVICE):
        dtype = torch.bfloat16 if harness.GPU else torch.float32
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = tiny.tokenizer().eos_token_id
    return model


def make_model(width: int, layers: int, depth: int, vocab: int, family: str = "qwen2_5_vl") -> PreTrainedModel:
    """An fp32 model of one of ``FAMILIES`` with the same width in its text and vision parts, and patches of 14 x 14 pixels."""
    heads = width // (64 if width < 2048 else 128)
    text = {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2), "vocab_size": vocab,
    }  # fmt: skip
    vision_heads = max(2, width // 80)
    vision = {
        "hidden_size": width, "intermediate_size": 2 * width,
        "num_heads": 4 if width % vision_heads else vision_heads,
    }  # fmt: skip
    return FAMILIES[family](text, vision, depth).to(harness.DEVICE)


def _qwen2_5_vl(text: dict, vision: dict, depth: int) -> PreTrainedModel:
    return Qwen2_5_VLForConditionalGeneration(_config(text, {**vision, "depth": depth, "fullatt_block_indexes": [depth - 1]}))


def _qwen3_5(text: dict, vision: dict, depth: int) -> PreTrainedModel:
    """Three linear layers before each full one. Their values have the width of the model and their keys half, as in Qwen3.5."""
    base, head = tiny.vlm().config, text["hidden_size"] // text["num_attention_heads"]
    tokens = {name: getattr(base, name) for name in ("image_token_id", "video_token_id", "vision_start_token_id")}
    special = {name: getattr(base.text_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {
        **text, **special, "head_dim": head, "max_position_embeddings": 8192, "tie_word_embeddings": True,
        "linear_num_key_heads": text["num_attention_heads"] // 2, "linear_num_value_heads": text["num_attention_heads"],
        "linear_key_head_dim": head, "linear_value_head_dim": head,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5,
            "mrope_section": [head // 4 - 2 * (head // 12), head // 12, head // 12], "mrope_interleaved": True,
        },
    }  # fmt: skip
    vision = {
        **vision,
        "depth": depth,
        "patch_size": 14,
        "out_hidden_size": text["hidden_size"],
        "num_position_embeddings": 1024,
    }
    torch.manual_seed(0)
    config = Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)
    return Qwen3_5ForConditionalGeneration(config)


def _gemma3(text: dict, vision: dict, depth: int) -> PreTrainedModel:
    """Five layers with a sliding window before each full one; 256 image tokens per image of 448 x 448 pixels."""
    head = text["hidden_size"] // text["num_attention_heads"]
    ids = tiny.vlm().config
    vision = {
        "hidden_size": vision["hidden_size"], "intermediate_size": vision["intermediate_size"], "num_hidden_layers": depth,
        "num_attention_heads": vision["num_heads"], "image_size": 448, "patch_size": 14,
    }  # fmt: skip
    torch.manual_seed(0)
    config = Gemma3Config(
        text_config={**text, "head_dim": head, "query_pre_attn_scalar": head, "sliding_window": 512},
        vision_config={"model_type": "siglip_vision_model", **vision},
        mm_tokens_per_image=256,
        boi_token_index=ids.vision_start_token_id,
        eoi_token_index=ids.vision_start_token_id + 1,
        image_token_index=ids.image_token_id,
    )
    return Gemma3ForConditionalGeneration(config)


FAMILIES = {"qwen2_5_vl": _qwen2_5_vl, "qwen3_5": _qwen3_5, "gemma3": _gemma3}


def make_processor(side: int):
    """A processor that resizes every image to about ``side`` x ``side`` pixels."""
    processor = tiny.processor()
    processor.image_processor.min_pixels = processor.image_processor.max_pixels = side * side
    processor.image_processor.size = {"shortest_edge": side * side, "longest_edge": side * side}
    return processor
