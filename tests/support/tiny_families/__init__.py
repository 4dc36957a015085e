"""A tiny model and its real processor for every model family: 2 layers, random weights, no downloads."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.video_utils import VideoMetadata

SPECIAL = (
    *("<pad>", "<s>", "</s>", "<unk>", "<image>", "<video>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    *("<|image|>", "<|video|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
    *("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
    *("<img>", "</img>", "<IMG_CONTEXT>"),
    *("<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
    *(f"<row_{row + 1}_col_{col + 1}>" for row in range(6) for col in range(6)),
    *("<start_of_image>", "<image_soft_token>", "<end_of_image>"),
)


@cache
def vocabulary() -> dict[str, int]:
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet())]
    return {token: index for index, token in enumerate([*SPECIAL, *letters])}


def token_id(token: str) -> int:
    return vocabulary()[token]


def tokenizer(**named: str) -> tf.PreTrainedTokenizerFast:
    """One token per byte. named: the special tokens that a processor reads from its tokenizer, by attribute."""
    bpe = Tokenizer(models.BPE(vocab=vocabulary(), merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(list(SPECIAL))
    ends = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=bpe, **ends, padding_side="left", extra_special_tokens=named)


@dataclass(frozen=True)
class Sample:
    """The media of a sample: images as (height, width), videos as (frames, height, width)."""

    images: tuple[tuple[int, int], ...] = ()
    videos: tuple[tuple[int, int, int], ...] = ()


@dataclass
class Case:
    """A family under test. image, video: their placeholders in a prompt."""

    model: tf.PreTrainedModel
    processor: Any
    image: str
    samples: tuple[Sample, ...]
    video: str = ""

    def inputs(self, *chosen: int) -> dict[str, torch.Tensor]:
        """The output of the processor for the chosen samples (by default all). Each has its own pixels and question."""
        chosen = chosen or range(len(self.samples))
        texts, images, videos = [], [], []
        for index in chosen:
            sample, noise = self.samples[index], np.random.default_rng(index)
            pixels = [noise.integers(0, 256, (*size, 3), dtype=np.uint8) for size in (*sample.images, *sample.videos)]
            texts.append(self.image * len(sample.images) + self.video * len(sample.videos) + "why" * index + "?")
            images.append(pixels[: len(sample.images)])
            videos += pixels[len(sample.images) :]
        media = {"images": images} if any(images) else {}
        if videos:
            metadata = [VideoMetadata(len(video), fps=2.0, frames_indices=list(range(len(video)))) for video in videos]
            media |= {"videos": videos, "video_metadata": metadata, "do_sample_frames": False}
        return dict(self.processor(text=texts, padding=True, return_tensors="pt", **media))


TEXT = {
    "vocab_size": len(vocabulary()),
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MIXED = (Sample(), Sample(((28, 28),)), Sample(((28, 56), (56, 28))), Sample(((56, 56),)))
WITH_VIDEOS = (*MIXED, Sample(videos=((4, 28, 28),)), Sample(((56, 28),), ((2, 28, 56), (4, 28, 28))))
# For processors that stack videos, which then need the same number of frames.
OF_TWO_FRAMES = (*MIXED, Sample(videos=((2, 28, 28),)), Sample(((56, 28),), ((2, 28, 56), (2, 28, 28))))


def _mrope(*section: int) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section)}}


def _qwen(prefix: str, text: dict, vision: dict, size: dict, processor: str, samples=WITH_VIDEOS) -> Case:
    config = getattr(tf, f"{prefix}Config")(
        text_config={**TEXT, **text},
        vision_config={"depth": 2, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32, **vision},
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )
    images = tf.Qwen2VLImageProcessor(size=size, patch_size=vision.get("patch_size", 14))
    videos = tf.Qwen3VLVideoProcessor if processor == "Qwen3VLProcessor" else tf.Qwen2VLVideoProcessor
    videos = videos(size=size, patch_size=vision.get("patch_size", 14))
    processor = getattr(tf, processor)(image_processor=images, tokenizer=tokenizer(), video_processor=videos)
    block = "<|vision_start|><|{}_pad|><|vision_end|>"
    model = getattr(tf, f"{prefix}ForConditionalGeneration")(config)
    return Case(model, processor, block.format("image"), samples, block.format("video"))


PIXELS = {"shortest_edge": 28 * 28, "longest_edge": 16 * 28 * 28}
PIXELS_3 = {"shortest_edge": 32 * 32, "longest_edge": 16 * 32 * 32}


def qwen2_vl():
    vision = {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    return _qwen("Qwen2VL", _mrope(1, 1, 2), vision, PIXELS, "Qwen2VLProcessor")


def qwen2_5_vl():
    vision = {"intermediate_size": 32, "fullatt_block_indexes": [1]}
    return _qwen("Qwen2_5_VL", _mrope(1, 1, 2), vision, PIXELS, "Qwen2_5_VLProcessor")


VISION_3 = {"intermediate_size": 32, "num_position_embeddings": 16, "patch_size": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def qwen3_vl():
    vision = {**VISION_3, "deepstack_visual_indexes": [0]}
    return _qwen("Qwen3VL", _mrope(2, 1, 1), vision, PIXELS_3, "Qwen3VLProcessor")


def qwen3_vl_moe():
    vision = {**VISION_3, "deepstack_visual_indexes": [0]}
    return _qwen("Qwen3VLMoe", {**_mrope(2, 1, 1), **EXPERTS}, vision, PIXELS_3, "Qwen3VLProcessor")


def _linear(**more) -> dict:
    text = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
    return {**text, "rope_parameters": rope, "layer_types": ["linear_attention", "full_attention"], **more}


def qwen3_5():
    return _qwen("Qwen3_5", _linear(), VISION_3, PIXELS_3, "Qwen3VLProcessor")


def qwen3_5_moe():
    more = {**EXPERTS, "shared_expert_intermediate_size": 16}
    return _qwen("Qwen3_5Moe", _linear(**more), VISION_3, PIXELS_3, "Qwen3VLProcessor")


def _glm(prefix: str, samples: tuple[Sample, ...], **text) -> Case:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}
    config = getattr(tf, f"{prefix}Config")(
        text_config={**TEXT, "rope_parameters": rope, **text},
        vision_config={
            **{"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32},
            **{"image_size": 56, "patch_size": 14},
        },
        image_token_id=token_id("<|image|>"),
        video_token_id=token_id("<|video|>"),
        image_start_token_id=token_id("<|begin_of_image|>"),
        image_end_token_id=token_id("<|end_of_image|>"),
        video_start_token_id=token_id("<|begin_of_video|>"),
        video_end_token_id=token_id("<|end_of_video|>"),
    )
    size = {"shortest_edge": 2 * 28 * 28, "longest_edge": 32 * 28 * 28}
    images, videos = tf.Glm4vImageProcessor(size=size), tf.Glm4vVideoProcessor(size=size)
    processor = tf.Glm4vProcessor(image_processor=images, tokenizer=tokenizer(), video_processor=videos)
    image = "<|begin_of_image|><|image|><|end_of_image|>"
    return Case(
        getattr(tf, f"{prefix}ForConditionalGeneration")(config),
        processor,
        image,
        samples,
        "<|begin_of_video|><|video|><|end_of_video|>",
    )


# GLM-4V has one placeholder token for images and videos, and its model accepts only one kind in a batch.
def glm4v():
    return _glm("Glm4v", MIXED)


def glm4v_videos():
    return _glm("Glm4v", (Sample(), Sample(videos=((4, 28, 28),)), Sample(videos=((2, 28, 56), (4, 28, 28)))))


def glm4v_moe():
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
    return _glm("Glm4vMoe", MIXED, **experts, n_group=1, topk_group=1, n_shared_experts=1)


def glm46v():
    return _glm("Glm46V", MIXED, model_type="glm4v_text")


def _clip() -> dict:
    return {"model_type": "clip_vision_model", **TOWER, "image_size": 28, "patch_size": 14, "projection_dim": 16}


def _siglip(image_size: int = 28) -> dict:
    return {"model_type": "siglip_vision_model", **TOWER, "image_size": image_size, "patch_size": 14}


def _pixtral() -> dict:
    return {"model_type": "pixtral", **TOWER, "head_dim": 8, "image_size": 112, "patch_size": 7}


def llava():
    text = {"model_type": "llama", **TEXT}
    config = tf.LlavaConfig(vision_config=_clip(), text_config=text, image_token_index=token_id("<image>"))
    images = tf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    sizes = {"patch_size": 14, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    processor = tf.LlavaProcessor(images, tokenizer(), **sizes)
    return Case(tf.LlavaForConditionalGeneration(config), processor, "<image>", MIXED)


def _pixtral_processor(merge: int) -> tf.PixtralProcessor:
    images = tf.PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 7, "width": 7})
    return tf.PixtralProcessor(images, tokenizer(), patch_size=7, spatial_merge_size=merge)


def pixtral():
    config = tf.LlavaConfig(
        vision_config=_pixtral(),
        text_config={"model_type": "mistral", **TEXT, "sliding_window": None},
        image_token_index=token_id("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return Case(tf.LlavaForConditionalGeneration(config), _pixtral_processor(1), "[IMG]", MIXED)


def mistral3():
    text = {"model_type": "mistral", **TEXT, "sliding_window": None}
    config = tf.Mistral3Config(vision_config=_pixtral(), text_config=text, image_token_index=token_id("[IMG]"))
    return Case(tf.Mistral3ForConditionalGeneration(config), _pixtral_processor(2), "[IMG]", MIXED)


PINPOINTS = [[28, 56], [56, 28], [56, 56]]


def llava_next():
    config = tf.LlavaNextConfig(
        vision_config=_clip(),
        text_config={"model_type": "mistral", **TEXT, "sliding_window": None},
        image_token_index=token_id("<image>"),
        image_grid_pinpoints=PINPOINTS,
    )
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    images = tf.LlavaNextImageProcessor(image_grid_pinpoints=PINPOINTS, **size)
    sizes = {"patch_size": 14, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    processor = tf.LlavaNextProcessor(images, tokenizer(), **sizes)
    return Case(tf.LlavaNextForConditionalGeneration(config), processor, "<image>", MIXED)


def llava_onevision():
    config = tf.LlavaOnevisionConfig(
        vision_config=_siglip(),
        text_config={"model_type": "qwen2", **TEXT},
        image_token_index=token_id("<image>"),
        video_token_index=token_id("<video>"),
        image_grid_pinpoints=PINPOINTS,
    )
    size = {"size": {"height": 28, "width": 28}}
    images = tf.LlavaOnevisionImageProcessor(image_grid_pinpoints=PINPOINTS, **size)
    processor = tf.LlavaOnevisionProcessor(
        images,
        tokenizer(),
        tf.LlavaOnevisionVideoProcessor(**size),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
    )
    return Case(tf.LlavaOnevisionForConditionalGeneration(config), processor, "<image>", OF_TWO_FRAMES, "<video>")


def internvl():
    config = tf.InternVLConfig(
        vision_config={**TOWER, "image_size": [28, 28], "patch_size": [7, 7]},
        text_config={"model_type": "qwen2", **TEXT},
        image_token_id=token_id("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    named = {"start_image_token": "<img>", "end_image_token": "</img>"}
    named |= {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    size = {"size": {"height": 28, "width": 28}}
    images, videos = tf.GotOcr2ImageProcessor(max_patches=4, **size), tf.InternVLVideoProcessor(**size)
    processor = tf.InternVLProcessor(images, tokenizer(**named), videos, image_seq_length=4)
    return Case(tf.InternVLForConditionalGeneration(config), processor, "<IMG_CONTEXT>", OF_TWO_FRAMES, "<video>")


def _idefics(prefix: str) -> tf.PreTrainedModel:
    config = getattr(tf, f"{prefix}Config")(
        vision_config={**TOWER, "image_size": 28, "patch_size": 7},
        text_config={"model_type": "llama", **TEXT},
        image_token_id=token_id("<image>"),
        scale_factor=2,
    )
    return getattr(tf, f"{prefix}ForConditionalGeneration")(config)


def idefics3():
    images = tf.Idefics3ImageProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    return Case(_idefics("Idefics3"), tf.Idefics3Processor(images, tokenizer(), image_seq_len=4), "<image>", MIXED)


def smolvlm():
    """Uses the processor of Idefics3, which treats images in the same way: its own needs num2words."""
    return Case(_idefics("SmolVLM"), idefics3().processor, "<image>", MIXED)


def gemma3():
    config = tf.Gemma3Config(
        vision_config=_siglip(56),
        text_config={**TEXT, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        mm_tokens_per_image=4,
        boi_token_index=token_id("<start_of_image>"),
        eoi_token_index=token_id("<end_of_image>"),
        image_token_index=token_id("<image_soft_token>"),
    )
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    crops = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 14, "pan_and_scan_max_num_crops": 2}
    crops["pan_and_scan_min_ratio_to_activate"] = 1.2
    images = tf.Gemma3ImageProcessor(size={"height": 56, "width": 56}, **crops)
    processor = tf.Gemma3Processor(images, tokenizer(**named), image_seq_length=4)
    processor.images_kwargs = crops
    return Case(tf.Gemma3ForConditionalGeneration(config), processor, "<start_of_image>", MIXED)


def paligemma():
    images = tf.SiglipImageProcessor(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    processor = tf.PaliGemmaProcessor(images, tokenizer(image_token="<image>"))
    config = tf.PaliGemmaConfig(
        vision_config={**_siglip(), "projection_dim": 32},
        text_config={"model_type": "gemma", **TEXT, "vocab_size": len(processor.tokenizer)},
        image_token_index=token_id("<image>"),
        projection_dim=32,
    )
    return Case(tf.PaliGemmaForConditionalGeneration(config), processor, "<image>", MIXED)


def text():
    return Case(tf.Qwen2ForCausalLM(tf.Qwen2Config(**TEXT)), tokenizer(), "", (Sample(),) * 4)


BUILDERS = {
    build.__name__: build
    for build in (
        *(qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe, qwen3_5, qwen3_5_moe, glm4v, glm4v_videos, glm4v_moe, glm46v),
        *(llava, pixtral, mistral3, llava_next, llava_onevision, internvl, idefics3, smolvlm, gemma3, paligemma, text),
    )
}


@cache
def case(name: str) -> Case:
    """The case of that name, with weights so large that outputs differ (the projector of Gemma3 is initialized with zeros)."""
    torch.manual_seed(0)
    built = BUILDERS[name]()
    with torch.no_grad():
        for parameter in built.model.parameters():
            if parameter.dim() > 1:
                parameter.add_(0.02 * torch.randn_like(parameter)).mul_(4)
    built.model.eval()
    return built
