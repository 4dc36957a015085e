"""Qwen2.5-VL models with random weights for the benchmarks of training and decoding."""

import harness
import torch
from support import tiny
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

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


def make_model(width: int, layers: int, depth: int, vocab: int) -> Qwen2_5_VLForConditionalGeneration:
    """An fp32 model whose text and vision parts have the same width."""
    heads = width // (64 if width < 2048 else 128)
    text = {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2), "vocab_size": vocab,
    }  # fmt: skip
    vision_heads = max(2, width // 80)
    vision = {
        "depth": depth, "hidden_size": width, "intermediate_size": 2 * width, "fullatt_block_indexes": [depth - 1],
        "num_heads": 4 if width % vision_heads else vision_heads,
    }  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(_config(text, vision)).to(harness.DEVICE)


def make_processor(side: int):
    """A processor that resizes every image to about ``side`` x ``side`` pixels."""
    processor = tiny.processor()
    processor.image_processor.min_pixels = processor.image_processor.max_pixels = side * side
    processor.image_processor.size = {"shortest_edge": side * side, "longest_edge": side * side}
    return processor
