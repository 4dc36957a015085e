"""Model families. A row of ``FAMILIES`` holds everything that the package knows about one family.

Model inputs are a dict of tensors. ``AXES`` lists what the first axis of an input can count. To add a family, add a row to
``FAMILIES`` and a tiny model to tests/support/tiny_families.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

# What the first axis of an input counts. Its rows are in the order of the samples, and in a sample in the order of the images.
AXES = {
    "token": "samples; the second axis counts their tokens",
    "stack": "samples; the second axis counts the images, tiles or video frames of each, then padding",
    "image": "images",
    "video": "videos",
    "image_patch": "patches of images; image i has image_grid_thw[i].prod() of them",
    "video_patch": "patches of videos; video i has video_grid_thw[i].prod() of them",
    "tile": "tiles or crops of images and frames of videos, each with the same number of image tokens",
    "illustrated": "samples that have an image",
    "image_token": "image tokens",
}


@dataclass(frozen=True)
class Input:
    """One model input.

    Attributes:
        axis: a key of ``AXES``.
        pads: the other axes along which the model supports padding. Batches with different sizes along them can be joined.
        completion: the value on the tokens of a completion, for inputs with a value per token.
    """

    axis: str
    pads: tuple[int, ...] = ()
    completion: int = 0


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: used in error messages.
        model_types: the ``model_type`` of its configurations.
        inputs: the inputs of its models.
        media_tokens: the attributes of the configuration or the processor that hold the ids of image and video tokens and of
            the tokens that enclose them.
        prefix_sharing_unsupported: why the completions of a group cannot share one prompt, or None. The function of the same
            name also checks the decoder.
        unused: outputs of the processor that are not model inputs.
        frames_apart: for families whose position ids ``mrope_positions`` computes, whether each frame of a video is a separate
            run of tokens. None: the position ids come from the model's own function.
        features_in_list: whether its models expect image features as a list of (tokens, H) rather than as one tensor.
        image_token_id: the id of the image token in one model, set by ``family_of``.
    """

    name: str
    model_types: tuple[str, ...]
    inputs: dict[str, Input]
    media_tokens: tuple[str, ...] = ("image_token_id", "video_token_id")
    prefix_sharing_unsupported: str | None = None
    unused: tuple[str, ...] = ()
    frames_apart: bool | None = None
    features_in_list: bool = True
    image_token_id: int | None = None

    def axis(self, name: str) -> str:
        """Return the axis of an input.

        Raises:
            ValueError: the family has no input of this name.
        """
        if name in _FEATURES:
            return "image_token"
        if name not in self.inputs:
            raise ValueError(f"model inputs of the family {self.name} must be among {', '.join(self.inputs)}, got {name!r}")
        return self.inputs[name].axis


_FEATURES = ("image_features", "deepstack_features")  # replace pixels: see vlmkernels.models.image_features
_TOKEN, _IMAGE, _VIDEO = Input("token"), Input("image"), Input("video")
_TEXT = {"input_ids": _TOKEN, "attention_mask": _TOKEN}
# Images and videos of any size as rows of patches, with M-RoPE. Token types distinguish images (1) from videos (2).
_GRIDS = {
    **_TEXT,
    "mm_token_type_ids": _TOKEN,
    "pixel_values": Input("image_patch"),
    "image_grid_thw": _IMAGE,
    "pixel_values_videos": Input("video_patch"),
    "video_grid_thw": _VIDEO,
}
# Images padded to a common height and width, with their sizes before padding: Pixtral's vision tower.
_SIZED = {**_TEXT, "pixel_values": Input("image", pads=(2, 3)), "image_sizes": _IMAGE}
# An overview and tiles of each image, (images, tiles, C, H, W). image_sizes determines how many of the tiles are padding.
_TILED = {**_TEXT, "pixel_values": Input("image", pads=(1,)), "image_sizes": _IMAGE}

_QWEN_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_PIXTRAL_TOKENS = ("image_token_id", "image_break_token_id", "image_end_token_id")

TEXT = Family("text", (), _TEXT, media_tokens=())
FAMILIES = (
    Family("qwen2_vl", ("qwen2_vl",), _GRIDS, _QWEN_TOKENS, frames_apart=False),
    Family("qwen2_5_vl", ("qwen2_5_vl",), {**_GRIDS, "second_per_grid_ts": _VIDEO}, _QWEN_TOKENS, frames_apart=False),
    Family("qwen3_vl", ("qwen3_vl", "qwen3_vl_moe"), _GRIDS, _QWEN_TOKENS, frames_apart=True),
    Family(
        "qwen3_5",
        ("qwen3_5", "qwen3_5_moe"),
        _GRIDS,
        _QWEN_TOKENS,
        prefix_sharing_unsupported="its linear-attention layers would carry their state from one completion into the next",
    ),
    Family(
        "glm4v",
        ("glm4v", "glm4v_moe", "glm46v"),
        _GRIDS,
        (
            *("image_token_id", "image_start_token_id", "image_end_token_id"),
            *("video_token_id", "video_start_token_id", "video_end_token_id"),
        ),
    ),
    Family("llava", ("llava",), _SIZED, _PIXTRAL_TOKENS),  # and Pixtral; towers with a fixed image size have no image_sizes
    Family("mistral3", ("mistral3",), _SIZED, _PIXTRAL_TOKENS),
    Family("llava_next", ("llava_next",), _TILED),
    Family(
        "llava_onevision",
        ("llava_onevision",),
        {**_TILED, "batch_num_images": Input("illustrated"), "pixel_values_videos": _VIDEO},
    ),
    Family(
        "internvl",
        ("internvl",),
        {**_TEXT, "pixel_values": Input("tile")},
        ("image_token_id", "start_image_token_id", "end_image_token_id"),
        features_in_list=False,
    ),
    Family(
        "idefics3",
        ("idefics3", "smolvlm"),
        {**_TEXT, "pixel_values": Input("stack", pads=(1,)), "pixel_attention_mask": Input("stack", pads=(1,))},
        ("image_token_id", "fake_image_token_id", "global_image_token_id"),
    ),
    Family(
        "gemma3",
        ("gemma3",),
        {**_TEXT, "token_type_ids": _TOKEN, "pixel_values": Input("tile")},  # pan and scan: several crops per image
        ("image_token_id", "boi_token_id", "eoi_token_id"),
        prefix_sharing_unsupported="its image tokens attend in both directions; sliding windows would cover other completions",
        features_in_list=False,
    ),
    Family(
        "paligemma",
        ("paligemma",),
        {**_TEXT, "token_type_ids": Input("token", completion=1), "pixel_values": _IMAGE},
        ("image_token_id",),
        prefix_sharing_unsupported="the tokens of its prompt attend in both directions",
        features_in_list=False,
        unused=("labels",),  # -100 everywhere for a prompt without an answer
    ),
)

# Decoders in which only causal attention with rotary positions moves information between tokens.
_PLAIN_DECODERS = (
    *("llama", "mistral", "qwen2", "qwen3", "qwen3_moe"),
    *("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text", "glm4v_text", "glm4v_moe_text"),
)


def family_of(config: PreTrainedConfig) -> Family:
    """Return the family of a model's configuration, or ``TEXT`` for a model without a vision part.

    Raises:
        NotImplementedError: no family has this ``model_type``.
    """
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return replace(family, image_token_id=config.image_token_id)
    if "vision_config" in config.sub_configs or "vision_config" in config.to_dict():
        known = ", ".join(name for family in FAMILIES for name in family.model_types)
        raise NotImplementedError(f"model_type must be one of {known} or a text model, got {config.model_type!r}")
    return TEXT


def media_token_ids(config: PreTrainedConfig, processor: ProcessorMixin | PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of image and video tokens and of the tokens that enclose them.

    They must not be sampled: the model would expect an image that does not exist.
    """
    names = family_of(config).media_tokens
    found = {getattr(owner, name, None) for owner in (config, processor) for name in names}
    return sorted(token for token in found if token is not None)


def missing_token_ids(config: PreTrainedConfig, processor: ProcessorMixin | PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of the model's vocabulary for which the tokenizer has no token.

    The embedding of most models has more rows than the tokenizer has tokens, for example 151936 rows for 151665 tokens. These
    ids must not be sampled: they have no text, and no training data taught the model what they mean.
    """
    tokenizer = processor if isinstance(processor, PreTrainedTokenizerBase) else processor.tokenizer
    known = set(tokenizer.get_vocab().values())
    return [token for token in range(config.get_text_config().vocab_size) if token not in known]


def prefix_sharing_unsupported(model_or_config: PreTrainedModel | PreTrainedConfig) -> str | None:
    """Return why the completions of a group cannot share one copy of their prompt, or None if they can.

    Args:
        model_or_config: a model without adapters, or its configuration. For a model, its attention backend and dropout are
            checked too.
    """
    if isinstance(model_or_config, PreTrainedConfig):
        return _config_unsupported(model_or_config)
    config = model_or_config.config
    name = type(model_or_config).__name__
    if reason := _config_unsupported(config):
        return f"{name}: {reason}"
    if not model_or_config._supports_attention_backend:
        return f"{name} does not support custom attention implementations"
    if dropout := getattr(config.get_text_config(), "attention_dropout", 0.0):
        return f"attention_dropout must be 0, got {dropout}"
    return None


def _config_unsupported(config: PreTrainedConfig) -> str | None:
    if reason := family_of(config).prefix_sharing_unsupported:
        return reason
    decoder = config.get_text_config()
    layer_types: Sequence[str] = getattr(decoder, "layer_types", None) or ()
    other = sorted(set(layer_types) - {"full_attention"})
    if not other and getattr(decoder, "sliding_window", None):
        other = [f"sliding_attention (sliding_window={decoder.sliding_window})"]
    if other:
        return f"its decoder has layers of type {', '.join(other)}"
    if decoder.model_type not in _PLAIN_DECODERS:
        return f"its decoder must be one of {', '.join(_PLAIN_DECODERS)}, got {decoder.model_type}"
    if getattr(decoder, "output_router_logits", False):
        return "the router's auxiliary loss would count the tokens of a shared prompt once (output_router_logits=True)"
    return None
