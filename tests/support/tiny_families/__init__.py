"""A tiny model and its real processor for every model family: 2 layers, random weights, no downloads."""

from functools import cache

import torch
import transformers as tf

from .base import SPECIAL, TEXT, Case, Sample, token_id, tokenizer, vocabulary
from .ernie import ernie4_5_vl_moe
from .gemma import gemma3, paligemma
from .gemma4 import gemma4, gemma4_ple, gemma4_unified
from .glm import glm4v, glm4v_moe, glm4v_videos, glm46v, glm46v_videos
from .hunyuan import hunyuan_vl
from .kimi import kimi_k25
from .lfm import lfm2_vl, lfm3_vl
from .llava import (
    aya_vision,
    idefics3,
    internvl,
    llava,
    llava_next,
    llava_onevision,
    mistral3,
    ovis2,
    pixtral,
    smolvlm,
)
from .minicpm import minicpmv4_7
from .molmo import molmo2, molmo2_videos
from .qwen import EXPERTS, qwen2_5_vl, qwen2_vl, qwen3_5, qwen3_5_moe, qwen3_next, qwen3_vl, qwen3_vl_moe

__all__ = ["BUILDERS", "EXPERTS", "NEWER", "SPECIAL", "TEXT", "Case", "Sample", "case", "token_id", "tokenizer", "vocabulary"]


def text():
    return Case(tf.Qwen2ForCausalLM(tf.Qwen2Config(**TEXT)), tokenizer(), "", (Sample(),) * 4)


# Model types that the oldest supported version of transformers does not have. With that version, their builders are left out.
NEWER = {"lfm3_vl", "minicpmv4_7", "molmo2"} - {*tf.CONFIG_MAPPING}

BUILDERS = {
    build.__name__: build
    for build in (
        *(qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe, qwen3_5, qwen3_5_moe, glm4v, glm4v_videos, glm4v_moe, glm46v),
        *(llava, pixtral, mistral3, llava_next, llava_onevision, internvl, idefics3, smolvlm, gemma3, paligemma, text),
        *(aya_vision, ovis2, qwen3_next, ernie4_5_vl_moe, hunyuan_vl, minicpmv4_7),
        *(gemma4, gemma4_ple, gemma4_unified, lfm2_vl, lfm3_vl, kimi_k25, molmo2, molmo2_videos, glm46v_videos),
    )
    if build.__name__.removesuffix("_videos") not in NEWER
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
