"""Model families. A row of ``FAMILIES`` holds everything that the package knows about one family.

Model inputs are a dict of tensors. ``AXES`` lists what the first axis of an input can count. To add a family, add a row to
``FAMILIES`` and a tiny model to tests/support/tiny_families/.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import transformers
from packaging.version import Version
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from vlmkernels.models import linear_attention

# What the first axis of an input counts. Its rows are in the order of the samples, and in a sample in the order of the images.
AXES = {
    "token": "samples; the second axis counts their tokens",
    "stack": "samples; the second axis counts the images, tiles or video frames of each, then padding",
    "image": "images",
    "video": "videos",
    "image_patch": "patches of images; row i of image_grid_thw or target_sizes has the product of its numbers",
    "video_patch": "patches of videos; row i of video_grid_thw or target_sizes_videos has the product of its numbers",
    "tile": "tiles or crops of images and frames of videos, with equally many image tokens or as many as spatial_shapes says",
    "crop": "crops of images; image i has image_num_crops[i] of them",
    "frame": "frames of videos; video i has num_frames_per_video[i] or video_grids[i, 0] of them",
    "chunk": "runs of frames that are encoded together; run i has video tokens in proportion to video_grid_thw[i, 1:].prod()",
    "image_slice": "overviews and slices of images, with image tokens in proportion to target_sizes[i].prod()",
    "video_slice": "overviews and slices of frames of videos, with video tokens in proportion to target_sizes_videos[i].prod()",
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
        indexes: for an input that holds indices, the name of the input into whose first two axes, flattened, they point. They
            count from the start of the batch; -1 means none.
        side_by_side: the N rows are square patches of P x P pixels, side by side in one tensor (1, channels, P, N * P).
    """

    axis: str
    pads: tuple[int, ...] = ()
    completion: int = 0
    indexes: str | None = None
    side_by_side: bool = False


@dataclass(frozen=True)
class Bidirectional:
    """Tokens that attend to one another in both directions: each run of tokens with one of the ``values`` of an input.

    Attributes:
        name: an input with a value per token.
        values: its values on these tokens.
        linked: whether all of them in a sequence attend to one another, rather than those of each run.
        setting: the value of ``use_bidirectional_attention`` in the text configuration of the models that do so. None: all.
    """

    name: str
    values: tuple[int, ...]
    linked: bool = False
    setting: str | None = None


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: used in error messages.
        model_types: the ``model_type`` of its configurations.
        inputs: the inputs of its models.
        media_tokens: the attributes of the configuration or the processor that hold image and video tokens and the tokens that
            enclose them: an id, a list of ids or the text of a token.
        prefix_sharing_unsupported: why the completions of a group cannot share one prompt, or None. The function of the same
            name also checks the decoder.
        unused: outputs of the processor that are not model inputs.
        frames_apart: for families whose position ids ``mrope_positions`` computes, whether each frame of a video is a separate
            run of tokens. None: the position ids come from the model's own function.
        features_in_list: whether its models expect image features as a list of (tokens, H) rather than as one tensor.
        image_tokens_per: the axis whose rows all have the same number of image tokens, which packs check. None: no such axis.
        bidirectional: the tokens that attend in both directions, or None.
        pack_inputs: the inputs with a value per token, besides tokens and mask, that the model needs in packs.
        first_position: the position id of the first token of a sequence.
        relative_positions: whether the position ids of an image change only by a shift with the tokens before it.
        mixes_media: whether a batch may have both images and videos.
        max_videos: how many videos a sample may have. None: any number.
        image_token_id, video_token_id: the ids of the image and video token in one model, set by ``family_of``.
    """

    name: str
    model_types: tuple[str, ...]
    inputs: dict[str, Input]
    media_tokens: tuple[str, ...] = ("image_token_id", "video_token_id")
    prefix_sharing_unsupported: str | None = None
    unused: tuple[str, ...] = ()
    frames_apart: bool | None = None
    features_in_list: bool = True
    image_tokens_per: str | None = None
    bidirectional: Bidirectional | None = None
    pack_inputs: tuple[str, ...] = ()
    first_position: int = 0
    relative_positions: bool = True
    mixes_media: bool = True
    max_videos: int | None = None
    image_token_id: int | None = None
    video_token_id: int | None = None

    def spec(self, name: str) -> Input:
        """Return the description of an input.

        Raises:
            ValueError: the family has no input of this name.
        """
        if name in FEATURES:
            return Input("image_token")
        if name not in self.inputs:
            raise ValueError(f"model inputs of the family {self.name} must be among {', '.join(self.inputs)}, got {name!r}")
        return self.inputs[name]

    def axis(self, name: str) -> str:
        """Return the axis of an input. Raises as ``spec`` does."""
        return self.spec(name).axis


PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}  # the input of the pixels, by kind of media
FEATURES = ("image_features", "deepstack_features")  # replace pixels: see vlmkernels.models.image_features
_TOKEN, _IMAGE, _VIDEO = Input("token"), Input("image"), Input("video")
_TEXT = {"input_ids": _TOKEN, "attention_mask": _TOKEN}
# Images and videos of any size as rows of patches.
_PATCHES = {
    **_TEXT,
    "pixel_values": Input("image_patch"),
    "image_grid_thw": _IMAGE,
    "pixel_values_videos": Input("video_patch"),
    "video_grid_thw": _VIDEO,
}
# The same with M-RoPE. Token types distinguish images (1) from videos (2).
_GRIDS = {**_PATCHES, "mm_token_type_ids": _TOKEN}
# Images padded to a common height and width, with their sizes before padding: Pixtral's vision tower.
_SIZED = {**_TEXT, "pixel_values": Input("image", pads=(2, 3)), "image_sizes": _IMAGE}
# An overview and tiles of each image, (images, tiles, C, H, W). image_sizes determines how many of the tiles are padding.
_TILED = {**_TEXT, "pixel_values": Input("image", pads=(1,)), "image_sizes": _IMAGE}

_QWEN_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_ENCLOSED_TOKENS = tuple(f"{kind}{part}_token_id" for kind in ("image", "video") for part in ("", "_start", "_end"))
_PIXTRAL_TOKENS = ("image_token_id", "image_break_token_id", "image_end_token_id")

TEXT = Family("text", (), _TEXT, media_tokens=())
FAMILIES = (
    Family("qwen2_vl", ("qwen2_vl",), _GRIDS, _QWEN_TOKENS, frames_apart=False, image_tokens_per="image_patch"),
    Family(
        "qwen2_5_vl",
        ("qwen2_5_vl",),
        {**_GRIDS, "second_per_grid_ts": _VIDEO},
        _QWEN_TOKENS,
        frames_apart=False,
        image_tokens_per="image_patch",
    ),
    Family("qwen3_vl", ("qwen3_vl", "qwen3_vl_moe"), _GRIDS, _QWEN_TOKENS, frames_apart=True, image_tokens_per="image_patch"),
    Family("qwen3_5", ("qwen3_5", "qwen3_5_moe"), _GRIDS, _QWEN_TOKENS, image_tokens_per="image_patch"),
    Family(
        "glm4v",
        ("glm4v", "glm4v_moe", "glm46v"),
        _GRIDS,
        _ENCLOSED_TOKENS,
        image_tokens_per="image_patch",
        mixes_media=False,  # one placeholder token for both
    ),
    Family(
        "ernie4_5_vl_moe",
        ("ernie4_5_vl_moe",),
        {**_GRIDS, "moe_mm_token_type_ids": _TOKEN},  # chooses the experts for text or those for images and videos
        _ENCLOSED_TOKENS,
        image_tokens_per="image_patch",
        pack_inputs=("moe_mm_token_type_ids",),
    ),
    Family(
        "hunyuan_vl",
        ("hunyuan_vl",),
        {name: _GRIDS[name] for name in (*_TEXT, "mm_token_type_ids", "pixel_values", "image_grid_thw")},
        ("image_token_id", "image_start_token_id", "image_end_token_id"),
        relative_positions=False,
    ),
    Family(
        "minicpmv4_7",
        ("minicpmv4_7",),
        {
            **_TEXT,
            "mm_token_type_ids": _TOKEN,
            "pixel_values": Input("image_patch", side_by_side=True),
            "target_sizes": Input("image_slice"),
            "pixel_values_videos": Input("video_patch", side_by_side=True),
            "target_sizes_videos": Input("video_slice"),
        },
        (
            *("image_token_id", "image_start_token", "image_end_token", "slice_start_token", "slice_end_token"),
            *("image_id_start_token", "image_id_end_token", "video_token_id"),
        ),
        image_tokens_per="image_patch",
        relative_positions=False,
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
        image_tokens_per="tile",
    ),
    Family(
        "aya_vision",
        ("aya_vision",),
        {**_TEXT, "pixel_values": Input("tile")},
        ("image_token_id", "start_of_img_token", "end_of_img_token"),
        features_in_list=False,
        image_tokens_per="tile",
    ),
    Family(
        "ovis2",
        ("ovis2",),
        {**_TEXT, "pixel_values": Input("tile")},
        ("image_token_id", "visual_indicator_token_ids"),
        features_in_list=False,
        image_tokens_per="tile",
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
        features_in_list=False,
        image_tokens_per="tile",
        bidirectional=Bidirectional("token_type_ids", (1,)),
    ),
    Family(
        "paligemma",
        ("paligemma",),
        {**_TEXT, "token_type_ids": Input("token", completion=1), "pixel_values": _IMAGE},
        ("image_token_id",),
        features_in_list=False,
        unused=("labels",),  # -100 everywhere for a prompt without an answer
        image_tokens_per="image",
        bidirectional=Bidirectional("token_type_ids", (0,), linked=True),
        first_position=1,
    ),
    Family(
        "gemma4",
        ("gemma4", "gemma4_unified"),
        {
            **_TEXT,
            "mm_token_type_ids": _TOKEN,
            **{"pixel_values": _IMAGE, "image_position_ids": _IMAGE},
            **{"pixel_values_videos": Input("frame"), "video_position_ids": Input("frame"), "num_frames_per_video": _VIDEO},
        },
        (
            *("image_token_id", "boi_token_id", "eoi_token_id", "video_token_id"),
            *("audio_token_id", "boa_token_id", "eoa_token_index"),
        ),
        bidirectional=Bidirectional("mm_token_type_ids", (1, 2), setting="vision"),
    ),
    Family(
        "lfm2_vl",
        ("lfm2_vl",),
        {**_TEXT, "pixel_values": Input("tile"), "pixel_attention_mask": Input("tile"), "spatial_shapes": Input("tile")},
        ("image_token_id", "image_start_token", "image_end_token", "image_thumbnail_token"),
    ),
    Family("lfm3_vl", ("lfm3_vl",), _PATCHES, _QWEN_TOKENS, image_tokens_per="image_patch"),
    Family(
        "kimi_k25",
        ("kimi_k25",),
        {**_PATCHES, "video_grid_thw": Input("chunk")},
        _QWEN_TOKENS,
        image_tokens_per="image_patch",
    ),
    Family(
        "molmo2",
        ("molmo2",),
        {
            **{**_TEXT, "mm_token_type_ids": _TOKEN},
            **{"pixel_values": Input("crop"), "image_grids": _IMAGE, "image_num_crops": _IMAGE},
            "image_token_pooling": Input("image_token", indexes="pixel_values"),
            **{"pixel_values_videos": Input("frame"), "video_grids": _VIDEO},
            "video_token_pooling": Input("image_token", indexes="pixel_values_videos"),
        },
        ("image_token_ids",),
        bidirectional=Bidirectional("mm_token_type_ids", (1,), linked=True),
        pack_inputs=("mm_token_type_ids",),
        mixes_media=False,
        max_videos=1,
    ),
)

# Decoders in which nothing but attention and the recurrent layers of _RECURRENT moves information between tokens: the
# model_type of their text configuration.
DECODERS = (
    *("cohere2", "deepseek_v3", "ernie4_5_vl_moe_text", "gemma", "gemma3_text", "gemma4_text", "gemma4_unified_text"),
    *("glm4v_moe_text", "glm4v_text", "hunyuan_vl_text", "lfm2", "lfm3", "llama", "mistral", "molmo2_text", "qwen2"),
    *("qwen2_5_vl_text", "qwen2_vl_text", "qwen3", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next"),
    *("qwen3_vl_moe_text", "qwen3_vl_text"),
)
# Of these, decoders in which image tokens attend in both directions only in layers with a sliding window.
SPANS_IN_WINDOWS_ONLY = ("gemma4_text",)
# Decoders in which image tokens attend to all others of their image, even those outside of the window.
SPANS_BEYOND_WINDOWS = ("gemma4_unified_text",)
# Types of layers whose states fork at the segments of a tree (vlmkernels.models.linear_attention).
_RECURRENT = {"linear_attention", "conv"}
_LAYER_TYPES = _RECURRENT | {"full_attention", "sliding_attention"}


def family_of(config: PreTrainedConfig) -> Family:
    """Return the family of a model's configuration, or ``TEXT`` for a model without a vision part.

    Raises:
        NotImplementedError: no family has this ``model_type``.
    """
    for family in FAMILIES:
        if config.model_type in family.model_types:
            video_token_id = getattr(config, "video_token_id", None)
            spans, setting = family.bidirectional, getattr(config.get_text_config(), "use_bidirectional_attention", None)
            if spans is not None and spans.setting not in (None, setting):
                spans = None
            ids = {"image_token_id": config.image_token_id, "video_token_id": video_token_id}
            return replace(family, bidirectional=spans, **ids)
    if "vision_config" in config.sub_configs or "vision_config" in config.to_dict():
        known = ", ".join(name for family in FAMILIES for name in family.model_types)
        raise NotImplementedError(f"model_type must be one of {known} or a text model, got {config.model_type!r}")
    return TEXT


def media_token_ids(config: PreTrainedConfig, processor: ProcessorMixin | PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of image and video tokens and of the tokens that enclose them.

    They must not be sampled: the model would expect an image that does not exist.
    """
    names = family_of(config).media_tokens
    values = [getattr(owner, name, None) for owner in (config, processor) for name in names]
    tokens = {token for value in values for token in (value if isinstance(value, (list, tuple)) else [value])}
    vocabulary = _tokenizer(processor).get_vocab()
    ids = {vocabulary.get(token) if isinstance(token, str) else token for token in tokens}
    return sorted(token for token in ids if token is not None)


def _tokenizer(processor: ProcessorMixin | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    return processor if isinstance(processor, PreTrainedTokenizerBase) else processor.tokenizer


def missing_token_ids(config: PreTrainedConfig, processor: ProcessorMixin | PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of the model's vocabulary for which the tokenizer has no token.

    The embedding of most models has more rows than the tokenizer has tokens, for example 151936 rows for 151665 tokens. These
    ids must not be sampled: they have no text, and no training data taught the model what they mean.
    """
    known = set(_tokenizer(processor).get_vocab().values())
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
    if reason := linear_attention.unsupported(model_or_config.get_decoder()):
        return f"{name}: {reason}"
    # transformers' own models are tested; not all that support other attention functions say so (Qwen3.5).
    if not (model_or_config._supports_attention_backend or type(model_or_config).__module__.startswith("transformers.models.")):
        return f"{name} does not support custom attention implementations"
    if dropout := getattr(config.get_text_config(), "attention_dropout", 0.0):
        return f"attention_dropout must be 0, got {dropout}"
    return None


def recurrent_layers(config: PreTrainedConfig) -> set[str]:
    """Return the types of the recurrent layers of a decoder, from its text configuration."""
    return _RECURRENT.intersection(getattr(config, "layer_types", None) or ())


def _config_unsupported(config: PreTrainedConfig) -> str | None:
    if reason := family_of(config).prefix_sharing_unsupported:
        return reason
    decoder = config.get_text_config()
    layer_types: Sequence[str] = getattr(decoder, "layer_types", None) or ()
    if other := sorted(set(layer_types) - _LAYER_TYPES):
        return f"its decoder has layers of type {', '.join(other)}"
    if decoder.model_type not in DECODERS:
        return f"its decoder must be one of {', '.join(DECODERS)}, got {decoder.model_type}"
    if (cap := getattr(decoder, "attn_logit_softcapping", None)) is not None:
        return f"its attention caps the scores, which flash attention does not support (attn_logit_softcapping={cap})"
    if "conv" in layer_types and Version(transformers.__version__) < Version("5.22"):
        return f"its convolutions get no keywords before transformers 5.22, got {transformers.__version__}"
    return None
