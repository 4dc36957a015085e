"""Options of the vLLM engines, and the sampling options that they support."""

import os
from dataclasses import dataclass, field
from typing import Any

import torch

from vlmkernels.ops.checks import require_positive
from vlmkernels.rollout.base import Sampling

MODES = ("server", "colocate")


@dataclass(frozen=True)
class VLLMConfig:
    """Options of the vLLM engines. Error messages use the names in ``GRPOConfig``, most of which have the prefix ``vllm_``.

    Args:
        weights_dir: folder that weight updates go through. vLLM must see it under the same path.
        mode: "server" for a vLLM server, "colocate" for vLLM in this process.
        server_base_url: URL of the server.
        server_timeout: seconds to wait until the server is healthy.
        request_timeout: seconds for each request to the server.
        fingerprint_tolerance: largest relative difference between vLLM's and the trainer's log-probabilities of a fixed
            prompt after a weight update. Default: 1e-4 if vLLM runs in fp32, otherwise 0.02.
        gpu_memory_utilization: fraction of the GPU's memory that colocated vLLM may use.
        max_model_length: maximum number of tokens of prompt and completion in colocated vLLM. Default: the model's limit.
        max_num_seqs: maximum number of completions that colocated vLLM decodes at the same time. Default: 256.
        autocast_dtype: dtype of colocated vLLM if the model is in fp32. Otherwise vLLM has the dtype of the model.
        seed: seed of colocated vLLM.
        num_generations: largest number of completions per prompt that a call requests. A server must allow as many.
        chat_template_kwargs: arguments of ``apply_chat_template``.

    Raises:
        ValueError: a value is out of range.
    """

    weights_dir: str | os.PathLike
    mode: str = "colocate"
    server_base_url: str = "http://127.0.0.1:8000"
    server_timeout: float = 240.0
    request_timeout: float = 600.0
    fingerprint_tolerance: float | None = None
    gpu_memory_utilization: float = 0.3
    max_model_length: int | None = None
    max_num_seqs: int | None = None
    autocast_dtype: torch.dtype = torch.float32
    seed: int = 0
    num_generations: int = 1
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"vllm_mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if not self.server_base_url.startswith(("http://", "https://")):
            raise ValueError(f"vllm_server_base_url must begin with http:// or https://, got {self.server_base_url!r}")
        require_positive("vllm_server_timeout", self.server_timeout)
        require_positive("vllm_request_timeout", self.request_timeout)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"vllm_gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}")
        if self.fingerprint_tolerance is not None and self.fingerprint_tolerance <= 0:
            raise ValueError(f"vllm_fingerprint_tolerance must be None or > 0, got {self.fingerprint_tolerance}")
        if self.mode == "server" and self.max_num_seqs is not None:
            raise ValueError(
                f"max_num_seqs must be None with a vLLM server (set its --max-num-seqs instead), got {self.max_num_seqs}"
            )


def logprobs_modes(sampling: Sampling) -> list[str]:
    """Return the values of vLLM's ``logprobs_mode`` that give log-probabilities of the whole vocabulary at the temperature.

    Raw log-probabilities are at temperature 1. Processed log-probabilities are at the sampling temperature, but are those of
    the distribution that top_p, top_k and similar options leave. The preferred mode comes first.
    """
    modes = {"raw_logprobs": sampling.temperature == 1, "processed_logprobs": not sampling.is_restricted}
    return [mode for mode, usable in modes.items() if usable]


def check_sampling(sampling: Sampling) -> None:
    """Raise ValueError if vLLM does not support ``sampling``, or cannot return its log-probabilities."""
    if sampling.generation_kwargs:
        unknown = ", ".join(sorted(sampling.generation_kwargs))
        raise ValueError(f"generation_kwargs must hold only options that vLLM supports with use_vllm, got {unknown}")
    if not logprobs_modes(sampling):
        raise ValueError(
            "temperature must be 1 with use_vllm and top_p, top_k, min_p, a repetition penalty or min_new_tokens, because vLLM "
            f"returns log-probabilities either before the temperature or after such limits, got {sampling.temperature}"
        )
