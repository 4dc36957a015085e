"""Build a small Qwen2.5-VL: the real architecture, processor and chat format, with random weights and no download."""

import re
from collections.abc import Sequence

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from vlmkernels.evaluate.digits import DIGIT_PIXELS, MAX_DIGITS, PROMPT

END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|im_end|>"
SPECIAL_TOKENS = (
    *(END_OF_TEXT, "<|im_start|>", END_OF_TURN),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)

# Qwen's chat format without its default system prompt, which would double the length of these short prompts.
CHAT_TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>\
{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def build_tokenizer(texts: Sequence[str] = (PROMPT,)) -> Qwen2Tokenizer:
    """Build a byte-level BPE tokenizer like Qwen's, whose merges make each word in ``texts`` one token."""
    vocab = {byte: i for i, byte in enumerate(sorted(ByteLevel.alphabet()))}
    merges = []
    words = dict.fromkeys(word.replace(" ", "Ġ") for text in texts for word in re.findall(" ?[A-Za-z]+", text))
    for word in (*words, "user", "assistant"):
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append((word[: end - 1], word[end - 1]))
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        unk_token=END_OF_TEXT,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        extra_special_tokens=list(SPECIAL_TOKENS),
        padding_side="left",
    )


def build_processor(texts: Sequence[str] = (PROMPT,)) -> Qwen2_5_VLProcessor:
    """Build the processor. It keeps the size of images that consist of whole digits, so that each digit is one image token."""
    size = {"shortest_edge": DIGIT_PIXELS**2, "longest_edge": 1280 * DIGIT_PIXELS**2}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=build_tokenizer(texts),
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: Qwen2_5_VLProcessor, seed: int, num_layers: int = 2) -> Qwen2_5_VLForConditionalGeneration:
    """Build a model with random weights, about 600 thousand with 2 layers.

    The vision tower has one layer with windowed and one with full attention; the text model has ``num_layers`` layers.
    """
    tokenizer = processor.tokenizer
    token_id = tokenizer.convert_tokens_to_ids
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,
    )
    vision = dict(
        depth=2,
        hidden_size=64,
        intermediate_size=128,
        num_heads=2,
        out_hidden_size=text["hidden_size"],
        window_size=112,
        fullatt_block_indexes=[1],
        initializer_range=0.05,
    )
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def prompt_texts(processor: Qwen2_5_VLProcessor, rows: list[dict]) -> list[str]:
    """Render the prompts of the rows with the chat template, including the generation prompt."""
    return [processor.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True) for row in rows]


@torch.no_grad()
def read_numbers(model: PreTrainedModel, processor: Qwen2_5_VLProcessor, rows: list[dict]) -> list[str]:
    """Return the model's answers to the rows, decoded greedily."""
    images = [row["image"] for row in rows]
    inputs = processor(text=prompt_texts(processor, rows), images=images, padding=True, return_tensors="pt")
    sequences = model.eval().generate(**inputs.to(model.device), max_new_tokens=MAX_DIGITS + 1, do_sample=False)
    return processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
