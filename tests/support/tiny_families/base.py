"""What the tiny models of all families share: a vocabulary, a tokenizer, samples and the sizes of their parts."""

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
    *("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>"),
    *("<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"),
    *("<|IMAGE_PLACEHOLDER|>", "<|IMAGE_START|>", "<|IMAGE_END|>", "<|VIDEO_PLACEHOLDER|>", "<|VIDEO_START|>", "<|VIDEO_END|>"),
    *("<image_start>", "<image_pad>", "<image_end>"),
    *("<slice>", "</slice>", "</image>", "<image_id>", "</image_id>"),
    *("<|image>", "<image|>", "<|audio|>", "<|audio>", "<audio|>"),
    *("<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"),
    *(f"<|img_row_{row + 1}_col_{col + 1}|>" for row in range(2) for col in range(2)),
    *("<|media_pad|>", "<|kimi_k25_video_placeholder|>", "<|media_begin|>", "<|media_content|>", "<|media_end|>"),
    *("<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<im_end>", "<frame_start>", "<frame_end>", "<im_low>"),
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


def siglip(image_size: int = 28) -> dict:
    return {"model_type": "siglip_vision_model", **TOWER, "image_size": image_size, "patch_size": 14}
