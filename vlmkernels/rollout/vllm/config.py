"""Options of the vLLM engines, and the sampling options that they support."""

import os
from dataclasses import dataclass, field
from typing import Any

import torch

from vlmkernels.ops.checks import require_one_of, require_positive
from vlmkernels.rollout.base import Sampling

MODES = ("server", "colocate")
WEIGHT_TRANSFERS = ("auto", "memory", "folder")
MAX_TEMPERATURE = 2.0  # of vLLM


@dataclass(frozen=True)
class VLLMConfig:
    """Options of the vLLM engines. Error messages use the names in ``GRPOConfig``, most of which have the prefix ``vllm_``.

    Args:
        weights_dir: folder of weights that do not go to vLLM in memory. vLLM must see it under the same path.
        mode: "server" for a vLLM server, "colocate" for vLLM in this process.
        server_base_url: URL of the server.
        server_timeout: seconds to wait until the server is healthy.
        request_timeout: seconds for each request to the server.
        weight_transfer: how weights go to vLLM: in "memory", through a "folder", or "auto", in memory where it is possible.
        fingerprint_tolerance: largest relative difference between vLLM's and the trainer's log-probabilities of a fixed
            prompt after a weight update. Default: 1e-4 if vLLM runs in fp32, otherwise 0.02.
        gpu_memory_utilization: fraction of the GPU's memory that colocated vLLM may use.
        max_model_length: maximum number of tokens of prompt and completion in colocated vLLM. Default: the model's limit.
        max_num_seqs: maximum number of completions that colocated vLLM decodes at the same time. Default: 256.
        autocast_dtype: dtype of colocated vLLM if the model is in fp32. Otherwise vLLM has the dtype of the model.
        seed: seed of colocated vLLM.
        num_generations: largest number of completions per prompt that a call requests. A server must allow as many.
        chat_template_kwargs: arguments of ``apply_chat_template``.
        policy: the distribution whose log-probabilities the loss needs: "full", of the whole vocabulary, or "truncated", those
            with which the tokens were sampled. None: the loss needs none.
        routed_experts: whether rollouts have the experts of each token.

    Raises:
        ValueError: a value is out of range.
    """

    weights_dir: str | os.PathLike
    mode: str = "colocate"
    server_base_url: str = "http://127.0.0.1:8000"
    server_timeout: float = 240.0
    request_timeout: float = 600.0
    weight_transfer: str = "auto"
    fingerprint_tolerance: float | None = None
    gpu_memory_utilization: float = 0.3
    max_model_length: int | None = None
    max_num_seqs: int | None = None
    autocast_dtype: torch.dtype = torch.float32
    seed: int = 0
    num_generations: int = 1
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    policy: str | None = None
    routed_experts: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"vllm_mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        require_one_of("vllm_weight_transfer", self.weight_transfer, WEIGHT_TRANSFERS)
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


def logprobs_modes(sampling: Sampling, policy: str | None = None) -> list[str]:
    """Return the values of vLLM's ``logprobs_mode`` with which a run can sample, the preferred one first.

    Raw log-probabilities are those of the whole vocabulary at temperature 1. Processed log-probabilities are those with which
    tokens are sampled; where nothing but the temperature and a bias changes them, those of the whole vocabulary follow.

    Args:
        sampling: how completions are sampled.
        policy: see ``VLLMConfig``.
    """
    raw = sampling.temperature == 1 and policy != "truncated"
    processed = policy != "full" or not sampling.is_restricted
    return [mode for mode, usable in {"raw_logprobs": raw, "processed_logprobs": processed}.items() if usable]


def check_sampling(sampling: Sampling, policy: str | None = None) -> None:
    """Raise ValueError if vLLM does not support ``sampling``, or cannot return the log-probabilities of ``policy``."""
    if sampling.generation_kwargs:
        unknown = ", ".join(sorted(sampling.generation_kwargs))
        raise ValueError(f"generation_kwargs must hold only options that vLLM supports with use_vllm, got {unknown}")
    if sampling.temperature > MAX_TEMPERATURE:
        raise ValueError(f"temperature must be at most {MAX_TEMPERATURE:g} with use_vllm, got {sampling.temperature}")
    if not logprobs_modes(sampling, policy):
        raise ValueError(
            "temperature must be 1, or rollout_correction be set with rollout_policy 'truncated', with use_vllm and top_p, "
            "top_k, min_p, a repetition penalty or min_new_tokens, where the loss compares log-probabilities "
            "(rollout_correction, off_policy_mask_threshold), because vLLM returns them either before the temperature or after "
            f"such limits, got {sampling.temperature}"
        )
