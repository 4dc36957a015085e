"""Builds the rollout engine of a run."""

from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from vlmkernels.rollout.base import Engine, Sampling
from vlmkernels.rollout.generate import Generate
from vlmkernels.rollout.vllm.colocate import VLLMColocate
from vlmkernels.rollout.vllm.config import VLLMConfig
from vlmkernels.rollout.vllm.server import VLLMServer


def make_engine(
    model: PreTrainedModel,
    processor: Any,
    sampling: Sampling,
    accelerator: Accelerator,
    *,
    vllm: VLLMConfig | None = None,
    share_prefix: bool = True,
    max_num_seqs: int | None = None,
    max_tokens: int | None = None,
    router_replay: bool = False,
) -> Engine:
    """Build the engine that samples with the model itself, or with vLLM if ``vllm`` is given. Every rank calls it.

    Args:
        model, processor: the model, which may have LoRA adapters, and its processor.
        sampling: how completions are sampled in training.
        accelerator: the trainer's; only its main process updates the weights of a vLLM server.
        vllm: options of the vLLM engines; ``vllm.mode`` selects one. None selects ``Generate``.
        share_prefix, max_num_seqs, max_tokens, router_replay: options of ``Generate``, ignored with ``vllm``.

    Raises:
        ValueError: the engine does not support an option.
        ImportError: colocated vLLM is selected, but vLLM is not installed.
        RolloutError: the vLLM server cannot be reached or serves another model.
    """
    if vllm is None:
        options = {"max_num_seqs": max_num_seqs, "max_tokens": max_tokens, "router_replay": router_replay}
        return Generate(model, processor, sampling, share_prefix=share_prefix, **options)
    engine = VLLMServer if vllm.mode == "server" else VLLMColocate
    return engine(model, processor, sampling, vllm, accelerator)
