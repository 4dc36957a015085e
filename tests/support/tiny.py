"""Models with a few thousand parameters but real architectures, processors and tokenizers, created without downloads."""

from functools import cache

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

SPECIAL = {
    "end": "<|im_end|>",
    "start": "<|im_start|>",
    "pad": "<|endoftext|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


@cache
def _vocabulary() -> dict[str, int]:
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,?:!", "Ġ", "Ċ"]
    return {token: index for index, token in enumerate([*letters, *SPECIAL.values()])}


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE without merges: one token per character, and the special tokens of Qwen."""
    bpe = Tokenizer(models.BPE(vocab=_vocabulary(), merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(list(SPECIAL.values()))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=SPECIAL["end"],
        pad_token=SPECIAL["pad"],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


def processor() -> Qwen2_5_VLProcessor:
    """One token per 28 x 28 pixels."""
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=4 * 28 * 28),
        tokenizer=tokenizer(),
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )


def _ids() -> dict[str, int]:
    ids = {name: _vocabulary()[token] for name, token in SPECIAL.items()}
    return {"bos_token_id": None, "eos_token_id": ids["end"], "pad_token_id": ids["pad"]}, ids


def vlm(seed: int = 0, tied: bool = True) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL with 2 layers of width 32 and a vision tower of 2 layers."""
    torch.manual_seed(seed)
    text, ids = _ids()
    config = Qwen2_5_VLConfig(
        text_config={
            **TEXT,
            **text,
            "tie_word_embeddings": tied,
            "vocab_size": len(_vocabulary()),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["image"],
        video_token_id=ids["video"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=tied,
    )
    return _finish(Qwen2_5_VLForConditionalGeneration(config))


def qwen2_vl(seed: int = 0) -> Qwen2VLForConditionalGeneration:
    """Qwen2-VL with the sizes of ``vlm``."""
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    return _other_vlm(Qwen2VLForConditionalGeneration, Qwen2VLConfig, vision, seed)


def qwen3_vl(seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """Qwen3-VL with the sizes of ``vlm`` and the patch size of ``processor``; DeepStack features from the first layer."""
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32, "patch_size": 14,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    }  # fmt: skip
    return _other_vlm(Qwen3VLForConditionalGeneration, Qwen3VLConfig, vision, seed, head_dim=8)


def qwen3_vl_moe(seed: int = 0) -> Qwen3VLMoeForConditionalGeneration:
    """``qwen3_vl`` with 2 of 4 experts in each layer."""
    vision = qwen3_vl().config.vision_config.to_dict()
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return _other_vlm(Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeConfig, vision, seed, head_dim=8, **experts)


def qwen3_vl_large_patches(seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """Qwen3-VL with patches of 16 pixels, as released, and a vision tower of one layer. Its patch embedding has a bias."""
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32, "patch_size": 16,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    }  # fmt: skip
    torch.manual_seed(seed)
    text = {**TEXT, "head_dim": 8, "vocab_size": 60}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision)).eval()


def _other_vlm(model_class, config_class, vision: dict, seed: int, **text):
    torch.manual_seed(seed)
    special, ids = _ids()
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = {**TEXT, **special, **text, "vocab_size": len(_vocabulary()), "rope_parameters": rope}
    names = {"image_token_id": "image", "video_token_id": "video", "vision_start_token_id": "vision_start"}
    tokens = {name: ids[token] for name, token in names.items()}
    return _finish(model_class(config_class(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)))


def text_model(seed: int = 0) -> Qwen2ForCausalLM:
    """Qwen2 with 2 layers of width 32."""
    torch.manual_seed(seed)
    return _finish(Qwen2ForCausalLM(Qwen2Config(**TEXT, **_ids()[0], vocab_size=len(_vocabulary()))))


def _finish(model):
    """Enlarge the weights, so that the output distributions of the untrained model are not flat."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    model.generation_config.eos_token_id = _vocabulary()[SPECIAL["end"]]
    return model.eval()


def image(index: int, width: int = 28, height: int = 28) -> Image.Image:
    """An image with one color and a gradient, different for each index."""
    rows = torch.linspace(0, 255, height).view(-1, 1, 1).expand(height, width, 3)
    shade = torch.tensor([37.0 * index % 256, 91.0 * index % 256, 53.0 * index % 256])
    return Image.fromarray(((rows + shade) % 256).byte().numpy())


def rows(num: int, images: str = "one") -> list[dict]:
    """Samples with an answer.

    Args:
        images: "none", "one" (column image), "several" (1 or 2 in column images), "mixed" (0 to 2), or "videos" (in turn an
            image, a video of 2 to 4 frames, both).
    """
    samples = []
    for index in range(num):
        row = {"prompt": [{"role": "user", "content": f"what is {index}?"}], "answer": str(index)}
        if images == "one":
            row["image"] = image(index, width=28 * (1 + index % 2))
        elif images == "videos":
            if index % 3 != 1:
                row["images"] = [image(index)]
            if index % 3:
                row["videos"] = [[image(10 * index + k, width=56) for k in range(2 + index % 3)]]
        elif images != "none":
            count = 1 + index % 2 if images == "several" else index % 3
            row["images"] = [image(10 * index + k, width=28 * (1 + k)) for k in range(count)]
        samples.append(row)
    return samples
