"""The families of vision-language models: one row each. What a row says is all that the rest of the package knows of them.

A batch of model inputs is one dict of tensors; ``AXES`` says what the first axis of each may count. Adding a family is adding a
row to ``FAMILIES`` and a tiny model to tests/support/tiny_families.py.
"""

from dataclasses import dataclass, replace

# What the first axis of an input counts. Samples follow one another along it; so do the images or videos of a sample.
AXES = {
    "token": "samples; the second axis counts their tokens",
    "stack": "samples; the second axis counts the images or tiles of each, or the frames of its video, then padding",
    "image": "images",
    "video": "videos",
    "image_patch": "patches of images; image i has image_grid_thw[i].prod() of them",
    "video_patch": "patches of videos; video i has video_grid_thw[i].prod() of them",
    "tile": "tiles or crops of images, and frames of videos, each of which stands for the same number of image tokens",
    "illustrated": "samples that have an image",
    "image_token": "tokens that stand for images",
}


@dataclass(frozen=True)
class Input:
    """One model input.

    axis: a key of AXES. pads: the later axes that the model knows the padding of, so that batches can be joined where they
    differ. completion: of an input with tokens, its value at the tokens of a completion.
    """

    axis: str
    pads: tuple[int, ...] = ()
    completion: int = 0


@dataclass(frozen=True)
class Family:
    """A family of models.

    model_types: those of its configurations. inputs: what its models take. media_tokens: attributes of its configuration or
    processor, those that hold ids of tokens that stand for or enclose images and videos. share_prefix: None where a group of
    completions may share one prompt, otherwise why not; see ``why_not_share_prefix``. unused: what its processor makes beside
    model inputs. frames_apart: of families whose positions ``mrope_positions`` gives, whether a video is a run of tokens per
    frame; None: the model's own function gives them. features_in_list: whether its models hold the features of images as a list
    of (tokens, H), or as one tensor. image_token_id: of one model, set by ``family_of``.
    """

    name: str
    model_types: tuple[str, ...]
    inputs: dict[str, Input]
    media_tokens: tuple[str, ...] = ("image_token_id", "video_token_id")
    share_prefix: str | None = None
    unused: tuple[str, ...] = ()
    frames_apart: bool | None = None
    features_in_list: bool = True
    image_token_id: int | None = None

    def axis(self, name: str) -> str:
        """The axis of an input; raises where the family has no such input."""
        if name in _ENCODED:
            return "image_token"
        if name not in self.inputs:
            raise ValueError(f"model inputs of the family {self.name} must be among {', '.join(self.inputs)}, got {name!r}")
        return self.inputs[name].axis


_ENCODED = ("image_features", "deepstack_features")  # in place of pixels: see vlmkernels.models.image_features
_TOKEN, _IMAGE, _VIDEO = Input("token"), Input("image"), Input("video")
_TEXT = {"input_ids": _TOKEN, "attention_mask": _TOKEN}
# Images and videos of any size as rows of patches, with M-RoPE: token types tell images (1) from videos (2).
_GRIDS = {
    **_TEXT,
    "mm_token_type_ids": _TOKEN,
    "pixel_values": Input("image_patch"),
    "image_grid_thw": _IMAGE,
    "pixel_values_videos": Input("video_patch"),
    "video_grid_thw": _VIDEO,
}
# Images padded to one height and width, and the size of each before: Pixtral's vision tower.
_SIZED = {**_TEXT, "pixel_values": Input("image", pads=(2, 3)), "image_sizes": _IMAGE}
# An overview and tiles of each image, (images, tiles, C, H, W); image_sizes tells how many tiles are no padding.
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
        share_prefix="its linear-attention layers carry a state from token to token, through one completion into the next",
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
    Family("llava", ("llava",), _SIZED, _PIXTRAL_TOKENS),  # Pixtral itself too; towers of one size come without image_sizes
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
        {**_TEXT, "token_type_ids": _TOKEN, "pixel_values": Input("tile")},  # pan and scan makes several crops of an image
        ("image_token_id", "boi_token_id", "eoi_token_id"),
        share_prefix="its image tokens attend in both directions, and its sliding windows would hold other completions",
        features_in_list=False,
    ),
    Family(
        "paligemma",
        ("paligemma",),
        {**_TEXT, "token_type_ids": Input("token", completion=1), "pixel_values": _IMAGE},
        ("image_token_id",),
        share_prefix="the tokens of its prompt attend in both directions",
        features_in_list=False,
        unused=("labels",),  # all -100 for a prompt without an answer
    ),
)

# Decoders known to be causal attention with rotary positions and nothing else that looks from one token to another.
_PLAIN_DECODERS = (
    *("llama", "mistral", "qwen2", "qwen3", "qwen3_moe"),
    *("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text", "glm4v_text", "glm4v_moe_text"),
)


def family_of(config) -> Family:
    """The family of a model's configuration; that of text models where it has no vision part."""
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return replace(family, image_token_id=config.image_token_id)
    if "vision_config" in config.sub_configs or "vision_config" in config.to_dict():
        known = ", ".join(name for family in FAMILIES for name in family.model_types)
        raise NotImplementedError(f"model_type must be one of {known} or a text model, got {config.model_type!r}")
    return TEXT


def media_token_ids(config, processor) -> list[int]:
    """Ids of the tokens that stand for or enclose images and videos, of a model and its processor: sampled, they would ask for
    an image that is not there."""
    names = family_of(config).media_tokens
    found = {getattr(owner, name, None) for owner in (config, processor) for name in names}
    return sorted(found - {None})


def why_not_share_prefix(config) -> str | None:
    """None where the completions of a group may share one prompt under a model's configuration, otherwise the reason."""
    decoder = config.get_text_config()
    if reason := family_of(config).share_prefix:
        return reason
    other = sorted(set(getattr(decoder, "layer_types", None) or ()) - {"full_attention"})
    if not other and getattr(decoder, "sliding_window", None):
        other = [f"sliding_attention (sliding_window={decoder.sliding_window})"]
    if other:
        return f"its decoder has layers of type {', '.join(other)}"
    if decoder.model_type not in _PLAIN_DECODERS:
        return f"its decoder must be one of {', '.join(_PLAIN_DECODERS)}, got {decoder.model_type}"
    if getattr(decoder, "output_router_logits", False):
        return "its router's loss counts tokens, and would count those of a shared prompt once (output_router_logits=True)"
    return None
