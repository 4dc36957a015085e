"""Tiny models with their real classes, processors and tokenizers, created without downloads, and scripted samplers.

The weights are random and large, so that outputs depend visibly on every input. A forward pass takes some milliseconds.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch

KINDS = ("text", "qwen2_5_vl", "llava")
END_OF_TEXT, END_OF_TURN, LLAVA_IMAGE = "<|endoftext|>", "<|im_end|>", "<image>"
SPECIAL_TOKENS = (
    *(END_OF_TURN, END_OF_TEXT, "<|im_start|>"),  # the order in which a tokenizer adds them
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", LLAVA_IMAGE),
)
# Two tokens that decode to "ab", which encodes as one token.
MERGES = (("a", "b"), ("x", "y"), ("ab", "c"))
CHAT_TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
PLACEHOLDER = {"qwen2_5_vl": "<|image_pad|>", "llava": LLAVA_IMAGE}  # the token in the place of each feature of an image
IMAGE = {"qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>", "llava": LLAVA_IMAGE}  # in a prompt
HIDDEN = 64
TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
TOWER = {"hidden_size": 32, "intermediate_size": 64}
PIXELS = 28  # an image of n * m squares of this size has n * m tokens in Qwen2.5-VL; LLaVA resizes each image to one


def vocabulary() -> dict[str, int]:
    """Return the ids of all tokens: those of single bytes, of merges, and special ones."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*sorted(ByteLevel.alphabet()), *(first + second for first, second in MERGES), *SPECIAL_TOKENS]
    return {token: index for index, token in enumerate(tokens)}


def token_ids(*tokens: str) -> tuple[int, ...]:
    """Return the ids of tokens of the tiny models."""
    return tuple(vocabulary()[token] for token in tokens)


def tiny(kind: str, device: str = "cpu") -> tuple[Any, Any]:
    """Return a new copy of a tiny model and its processor.

    Args:
        kind: "text": Qwen2, whose processor is its tokenizer; "qwen2_5_vl": Qwen2.5-VL; "llava": LLaVA.
        device: that of the weights, which are in fp32.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    model, processor = _built(kind)
    return copy.deepcopy(model).to(device), copy.deepcopy(processor)


def scripted(kind: str, after: Mapping[str | None, Sequence[str]], device: str = "cpu") -> tuple[Any, Any]:
    """Return a tiny model that samples tokens by a script, and its processor.

    The next token depends only on the last one: all decoder layers add 0 to the embedding, which has one axis for each key of
    ``after``, and the logits of the tokens that may follow are 40, all others 0.

    Args:
        kind, device: see ``tiny``.
        after: the tokens that may follow, with equal probabilities, after a token; None: after any other token.
    """
    model, processor = tiny(kind, device)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "mlp.down_proj.weight")):
                parameter.zero_()
        table.zero_()
        head.zero_()
        table[:, 0] = 1
        for axis, (token, following) in enumerate(sorted(after.items(), key=lambda item: item[0] is not None)):
            if token is not None:
                table[token_ids(token)] = torch.eye(HIDDEN, device=device)[axis]
            head[list(token_ids(*following)), axis] = 40 / HIDDEN**0.5  # the norm makes the embedding HIDDEN ** 0.5
    return model, processor


def prompt_text(processor: Any, sample: Any) -> str:
    """Return the prompt of a sample as text, with one placeholder per image."""
    return str(processor.apply_chat_template(sample.messages, tokenize=False, add_generation_prompt=True))


def encode(
    processor: Any, samples: Sequence[Any], padding_side: str = "left", completions: bool = False, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """Return the inputs of the model for one padded batch, as its processor makes them.

    Args:
        samples: see ``Sample``.
        padding_side: where to pad.
        completions: whether to append the completions to the prompts, before padding.
        device: that of the inputs.
    """
    pictures = [picture for sample in samples for picture in sample.pictures]
    texts = [prompt_text(processor, sample) for sample in samples]
    images = {"images": pictures} if pictures else {}
    inputs = dict(processor(text=texts, padding=True, return_tensors="pt", **images))
    attended = inputs["attention_mask"].bool()
    padding = {"input_ids": getattr(processor, "tokenizer", processor).pad_token_id}
    for name in [name for name, value in inputs.items() if value.shape == attended.shape]:
        rows = [row[mask] for row, mask in zip(inputs[name], attended, strict=True)]
        if completions:
            rows = [torch.cat([row, _following(name, sample)]) for row, sample in zip(rows, samples, strict=True)]
        pad = {"padding_value": padding.get(name, 0), "padding_side": padding_side}
        inputs[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, **pad)
    return {name: value.to(device) for name, value in inputs.items()}


def _following(name: str, sample: Any) -> torch.Tensor:
    """Return an input of the model for the completion of a sample."""
    ids = torch.tensor(sample.completion_ids, dtype=torch.int64)
    return ids if name == "input_ids" else torch.full_like(ids, int(name == "attention_mask"))


def images_by_sample(inputs: Mapping[str, torch.Tensor], num_images: Sequence[int]) -> list[dict[str, torch.Tensor]]:
    """Return the inputs of the images of each sample, for trainers that process samples one by one and keep a list of them."""
    if "pixel_values" not in inputs:
        return [{} for _ in num_images]
    grids = inputs["image_grid_thw"].split([*num_images])
    pixels = inputs["pixel_values"].split([int(grid.prod(-1).sum()) for grid in grids])
    pairs = zip(pixels, grids, strict=True)
    return [{"pixel_values": rows, "image_grid_thw": grid} if len(grid) else {} for rows, grid in pairs]


@torch.no_grad()
def captured_positions(model: Any, inputs: Mapping[str, Any], run: Callable[..., Any] | None = None) -> torch.Tensor:
    """Return the position ids with which a model rotates queries and keys if it is called with these inputs.

    For adapters of trainers that leave the positions to the model.

    Args:
        run: calls the model with the inputs. Default: the model.
    """
    found: list[torch.Tensor] = []

    def capture(module: Any, args: Sequence[torch.Tensor], kwargs: Mapping[str, torch.Tensor]) -> None:
        found.append(kwargs["position_ids"] if "position_ids" in kwargs else args[1])

    rotary = model.get_decoder().rotary_emb
    handle = rotary.register_forward_pre_hook(capture, with_kwargs=True)
    try:
        (run or model)(**inputs)
    finally:
        handle.remove()
    return found[0].expand(*found[0].shape[:-2], *inputs["input_ids"].shape)


@cache
def _built(kind: str) -> tuple[Any, Any]:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = {"text": _qwen2, "qwen2_5_vl": _qwen2_5_vl, "llava": _llava}[kind]()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)  # a layer keeps the scale of its input
        model.get_input_embeddings().weight.normal_()
        model.get_output_embeddings().weight.mul_(2)  # the standard deviation of the logits
    end, pad = token_ids(END_OF_TURN, END_OF_TEXT)
    model.generation_config.update(eos_token_id=end, pad_token_id=pad, bos_token_id=None)
    return model.eval(), _processor(kind)


def _text_config() -> dict[str, Any]:
    end, pad = token_ids(END_OF_TURN, END_OF_TEXT)
    special = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": pad}
    return {**TEXT, **special, "vocab_size": len(vocabulary()), "tie_word_embeddings": False}


def _qwen2() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**_text_config()))


def _qwen2_5_vl() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    sections = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = token_ids("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    config = Qwen2_5_VLConfig(
        text_config={**_text_config(), "rope_parameters": sections},
        vision_config={**TOWER, "depth": 2, "num_heads": 2, "out_hidden_size": HIDDEN, "fullatt_block_indexes": [1]},
        **dict(zip(names, ids, strict=True)),
        tie_word_embeddings=False,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _llava() -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    tower = {**TOWER, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": PIXELS // 2, "projection_dim": 16}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **tower, "image_size": PIXELS},
        text_config={"model_type": "llama", **_text_config()},
        image_token_index=token_ids(LLAVA_IMAGE)[0],
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config)


def _processor(kind: str) -> Any:
    import transformers as tf

    words = [token for token in vocabulary() if token not in SPECIAL_TOKENS]
    template = CHAT_TEMPLATE.replace("IMAGE", IMAGE.get(kind, ""))
    tokenizer = tf.Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(words)},
        merges=list(MERGES),
        unk_token=END_OF_TEXT,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        extra_special_tokens=list(SPECIAL_TOKENS),
        padding_side="left",
        chat_template=template,
    )
    if kind == "text":
        return tokenizer
    if kind == "llava":
        images = tf.CLIPImageProcessor(size={"shortest_edge": PIXELS}, crop_size={"height": PIXELS, "width": PIXELS})
        sizes = {"patch_size": PIXELS // 2, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
        return tf.LlavaProcessor(images, tokenizer, **sizes, chat_template=template)
    size = {"shortest_edge": PIXELS**2, "longest_edge": 16 * PIXELS**2}
    return tf.Qwen2_5_VLProcessor(
        image_processor=tf.Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=tf.Qwen2VLVideoProcessor(size=size),
        chat_template=template,
    )
