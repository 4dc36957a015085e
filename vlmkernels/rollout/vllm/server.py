"""Sampling through the HTTP API of a vLLM server.

The server needs vLLM 0.32 or newer, started with VLLM_SERVER_DEV_MODE=1 and --enable-scale-out; see docs/rollout.md. It runs
none of this package's code, and this process does not import vLLM.
"""

import base64
import io
import json
import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import PreTrainedModel

from vlmkernels.http import CONNECTION_ERRORS, JSONClient, RequestError
from vlmkernels.rollout.base import RolloutError, Sampling
from vlmkernels.rollout.vllm.config import VLLMConfig, logprobs_modes
from vlmkernels.rollout.vllm.engine import VLLM, StaleWeights
from vlmkernels.rollout.vllm.main_process import on_main_process
from vlmkernels.rollout.vllm.requests import Key, Prompt, Reply, Requests, Video, VLLMCompletion
from vlmkernels.rollout.vllm.trajectory import Trajectory
from vlmkernels.rollout.vllm.transfer import BACKENDS, WeightTransfer, server_transfer
from vlmkernels.rollout.vllm.weights import lora_rank

logger = logging.getLogger(__name__)

CONCURRENCY = 64  # maximum number of simultaneous requests of a process
RETRIES, BACKOFF = 2, 0.5  # arguments of JSONClient
TRANSIENT = (429, 502, 503, 504)  # HTTP statuses that are retried
MAX_BYTES = 2**30  # maximum size of a reply
ADAPTER = "vlmkernels"  # the server's name for the adapter
FINAL_ONLY = 2  # vllm.sampling_params.RequestOutputKind: all completions in one reply


class VLLMClient:
    """Requests to a vLLM server. The value of VLLM_API_KEY is sent as a bearer token; the environment's proxies are not used.

    Args:
        base_url: URL of the server, for example "http://127.0.0.1:8000".
        timeout: seconds to wait until the server is healthy.
        request_timeout: seconds for each request.
    """

    def __init__(self, base_url: str, timeout: float, request_timeout: float):
        self.base_url, self.timeout = base_url.rstrip("/"), timeout
        self.http = JSONClient(
            timeout=request_timeout,
            max_bytes=MAX_BYTES,
            retries=RETRIES,
            backoff=BACKOFF,
            is_transient=TRANSIENT.__contains__,
            api_key_env="VLLM_API_KEY",
            use_proxies=False,
        )

    def wait(self) -> None:
        """Wait until the server is healthy. Raises RolloutError after ``timeout`` seconds."""
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                self.http.send(f"{self.base_url}/health", timeout=min(10.0, self.http.timeout))
                return
            except CONNECTION_ERRORS as error:
                if time.monotonic() >= deadline:
                    raise RolloutError(
                        "vllm_server_base_url must be the URL of a healthy vLLM server within "
                        f"vllm_server_timeout = {self.timeout:g} s, got {self.base_url} ({error})"
                    ) from error
            time.sleep(min(BACKOFF, max(0.0, deadline - time.monotonic())))

    def request(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return the JSON reply to a POST of ``body``, or to a GET if it is None; None if the reply is empty or plain text.

        Raises RolloutError after the last attempt. Before each retry it waits until the server is healthy.
        """

        def wait_before_retry(attempt: int) -> None:
            if attempt:
                self.wait()

        try:
            return self.http.request(self.base_url + path, body, _parse, wait_before_retry)
        except RequestError as error:
            raise RolloutError(str(error)) from error


def _parse(content: bytes) -> Any:
    return json.loads(content) if content[:1] in (b"{", b"[") else None


def png_url(image: Image.Image) -> str:
    """Return a data URL of the image as PNG, which is lossless, at the fastest compression level."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def video_url(video: Video) -> str:
    """Return a data URL of the frames of a video: lossless PNG images, although its type says "video/jpeg".

    This type, of a list of images, is the only one from which vLLM takes all frames, and it reads images of any format.
    """
    frames = [png_url(Image.fromarray(frame)) for frame in video.frames.permute(0, 2, 3, 1).cpu().numpy()]
    return "data:video/jpeg;base64," + ",".join(frame.partition(",")[2] for frame in frames)


def _completion(choice: dict[str, Any]) -> VLLMCompletion:
    logps = choice.get("logprobs")
    if logps is not None:
        content = [(at, *at["top_logprobs"]) for at in logps["content"]]
        logps = [{int(x["token_id"]): float(x["logprob"]) for x in entries} for entries in content]
    versions = dict.fromkeys(span["version"] for span in choice.get("weight_versions") or [])
    ids = [int(token) for token in choice["token_ids"]]
    experts = choice.get("routed_experts")
    return VLLMCompletion(
        ids,
        logps,
        choice["finish_reason"] == "stop",
        " then ".join(versions) or None,
        choice.get("sampling_mask"),
        None if experts is None else np.load(io.BytesIO(base64.b64decode(experts)), allow_pickle=False),
    )


def _reply(content: Any) -> Reply:
    """Parse a reply of /inference/v1/generate. Raises RolloutError if its form is invalid."""
    try:
        completions = [_completion(choice) for choice in sorted(content["choices"], key=lambda choice: choice["index"])]
        token_ids, prompt_logps = [int(token) for token in content["prompt_token_ids"]], None
        if (entries := content.get("prompt_logprobs")) is not None:
            pairs = zip(token_ids[1:], entries[1:], strict=True)
            prompt_logps = [float(logps[str(token)]["logprob"]) for token, logps in pairs]
        return Reply(token_ids, completions, prompt_logps)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, EOFError) as error:
        raise RolloutError(f"vLLM's reply must be that of /inference/v1/generate, got {content!r:.300} ({error!r})") from error


class ServerRequests(Requests):
    """Requests to a server, each in a thread, at most ``CONCURRENCY`` at the same time.

    Args:
        client: sends the requests.
        model: the server's name of the model or adapter.
    """

    def __init__(self, client: VLLMClient, model: str):
        self.client, self.model = client, model
        self.executor = ThreadPoolExecutor(CONCURRENCY)
        self.pending: dict[Future[Reply], Key] = {}
        self.urls: dict[int, str] = {}  # by the id of the image or the frames, which trajectories keep alive

    def __exit__(self, *error: Any) -> None:
        self.executor.shutdown(wait=False, cancel_futures=True)

    def __len__(self) -> int:
        return len(self.pending)

    def send(self, key: Key, prompt: Prompt, params: dict[str, Any]) -> None:
        self.pending[self.executor.submit(self._request, prompt, params)] = key

    def replies(self, timeout: float | None) -> list[tuple[Key, Reply]]:
        done, _ = wait(self.pending, timeout, FIRST_COMPLETED)
        return [(self.pending.pop(future), future.result()) for future in done]

    def _request(self, prompt: Prompt, params: dict[str, Any]) -> Reply:
        body = {
            "model": self.model,
            "token_ids": prompt.token_ids,
            "content_parts": [
                *({"type": "image_url", "url": self._url(image, png_url, image)} for image in prompt.images),
                *({"type": "video_url", "url": self._url(video.frames, video_url, video)} for video in prompt.videos),
            ]
            or None,
            "sampling_params": {**params, "output_kind": FINAL_ONLY},
            "return_token_ids": True,
        }
        return _reply(self.client.request("/inference/v1/generate", body))

    def _url(self, key: object, encode: Callable[[Any], str], value: Any) -> str:
        if id(key) not in self.urls:
            self.urls[id(key)] = encode(value)
        return self.urls[id(key)]


class ServerInfo(NamedTuple):
    """Settings of a server.

    Attributes:
        name: name of the served model.
        logprobs_mode, returns_mask: its options --logprobs-mode and --return-sampling-mask.
        dtype: the dtype that it runs in.
        max_length: maximum number of tokens of a prompt and its completion.
        num_frames, fps: its options for videos: it cuts a video after ``num_frames`` frames unless that is negative, and takes
            every video as one of ``fps`` frames per second.
    """

    name: str
    logprobs_mode: str
    returns_mask: bool
    dtype: torch.dtype
    max_length: int
    num_frames: int
    fps: float


class VLLMServer(VLLM):
    """Samples through a vLLM server. Every rank sends the requests of its own prompts; the main process updates the weights.

    Raises:
        ValueError: the server was started without an option that the run needs.
        RolloutError: the server cannot be reached or serves another model. Ranks other than the main process raise this for
            any error.
    """

    def __init__(
        self, model: PreTrainedModel, processor: Any, sampling: Sampling, config: VLLMConfig, accelerator: Accelerator
    ):
        super().__init__(model, processor, sampling, config, accelerator)
        self.client = VLLMClient(config.server_base_url, config.server_timeout, config.request_timeout)
        info = on_main_process(accelerator, lambda: self._examine(model))
        self._set(info)

    # Before training

    def _set(self, info: ServerInfo) -> None:
        self.info, self.name, self.logprobs_mode = info, info.name, info.logprobs_mode
        self.returns_mask, self.dtype, self.max_length = info.returns_mask, info.dtype, info.max_length

    def _examine(self, model: PreTrainedModel) -> ServerInfo:
        """Check that the server can serve the run, and return its settings."""
        self.client.wait()
        self._check_endpoints()
        settings = self.client.request("/server_info?config_format=json")["vllm_config"]
        self._check_settings(settings, model)
        name = self.client.request("/v1/models")["data"][0]["id"]
        config = settings["model_config"]
        dtype = getattr(torch, str(config["dtype"]).removeprefix("torch."))
        video = ((config.get("multimodal_config") or {}).get("media_io_kwargs") or {}).get("video", {})
        info = ServerInfo(
            name,
            config["logprobs_mode"],
            bool(config.get("return_sampling_mask")),
            dtype,
            config["max_model_len"],
            num_frames=video.get("num_frames", 32),  # vLLM's defaults
            fps=video.get("fps", 1.0),
        )
        self._set(info)  # which _compare uses
        self._warn_of_uncounted()
        # Loading the weights of another model would break the server, so compare before the first update.
        launched = self.client.request("/weight_info")["weight_version"] == "default"
        self.client.request("/resume", {})  # a run that was killed during an update left the server paused
        if launched and settings["load_config"]["load_format"] != "dummy" and not self.accelerator.is_fsdp2:
            with model.disable_adapter() if self.adapter else nullcontext():
                self._compare(model, f"before training (is {name} the same model?)")
        else:
            self._fingerprint_logps()
        self._prepare_transfer(settings, model)
        return info

    def _prepare_transfer(self, settings: dict[str, Any], model: PreTrainedModel) -> None:
        """Choose how weights go to the server, and connect to it if they go in memory."""
        backend = (settings.get("weight_transfer_config") or {}).get("backend")
        obstacle = None
        if backend not in BACKENDS:
            given = f"with {backend!r} as" if backend else "without"
            obstacle = f"the server was started {given} --weight-transfer-config, whose backend must be {' or '.join(BACKENDS)}"
        elif backend == "ipc" and (gpus := (settings.get("parallel_config") or {}).get("world_size", 1)) > 1:
            obstacle = f"the server runs on {gpus} GPUs, and CUDA IPC reaches only that of the trainer's weights"
        elif model.device.type != "cuda":
            obstacle = f"the weights must be on a GPU to go to the server in memory, and are on {model.device.type}"
        self._choose_transfer(obstacle, "in memory, by " + {"ipc": "CUDA IPC", "nccl": "NCCL"}.get(backend, ""))
        if self.in_memory:
            self.connect: Callable[[], WeightTransfer] = partial(
                server_transfer, backend, self.client.request, self.client.base_url
            )
            self.transfer = self.connect()

    def _check_endpoints(self) -> None:
        reply = self.client.request("/openapi.json")
        if not isinstance(reply, dict) or "paths" not in reply:
            raise self._unusable("be a vLLM server", "no /openapi.json")
        needed = {
            "/collective_rpc": "VLLM_SERVER_DEV_MODE=1 in its environment",
            "/update_weight_version": "VLLM_SERVER_DEV_MODE=1 in its environment, and be of vLLM >= 0.32",
            "/inference/v1/generate": "--enable-scale-out",
        }
        if self.adapter:
            needed["/v1/load_lora_adapter"] = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"
        for path, option in needed.items():
            if path not in reply["paths"]:
                raise self._unusable(f"be started with {option}", f"no {path}")

    def _check_settings(self, settings: dict[str, Any], model: PreTrainedModel) -> None:
        config, mode = settings["model_config"], settings["model_config"]["logprobs_mode"]
        modes = logprobs_modes(self.sampling, self.config.policy)
        if mode not in modes:
            raise self._unusable(f"be started with --logprobs-mode {modes[0]}", mode)
        if config.get("return_sampling_mask") and self.sampling.top_k < 1:
            raise self._unusable("be started without --return-sampling-mask, or top_k must be > 0", self.sampling.top_k)
        if self.moe_layers and not (settings.get("aux_output_config") or {}).get("enable_return_routed_experts"):
            raise self._unusable("be started with --enable-return-routed-experts for router_replay", "no experts")
        returned = len(self.returned_ids)
        if mode == "processed_logprobs" and not self.sampling.is_restricted and returned > config["max_logprobs"]:
            raise self._unusable(f"be started with --max-logprobs {returned}", config["max_logprobs"])
        slots, number = settings["scheduler_config"]["max_num_seqs"], self.config.num_generations
        if number > slots:
            raise self._unusable(f"be started with --max-num-seqs {number} or more", slots)
        if self.sampling.max_new_tokens >= config["max_model_len"]:
            rule = f"be started with --max-model-len above {self.sampling.max_new_tokens} plus the length of a prompt"
            raise self._unusable(rule, config["max_model_len"])
        if self.adapter:
            lora, rank = settings["lora_config"], lora_rank(model, self.adapter)
            if lora is None:
                raise self._unusable(f"be started with --enable-lora --max-lora-rank {rank}", "no LoRA")
            if lora["max_lora_rank"] < rank:
                raise self._unusable(f"be started with --max-lora-rank {rank}", lora["max_lora_rank"])

    def _unusable(self, rule: str, value: Any) -> ValueError:
        return ValueError(
            f"vllm_server_base_url must be the URL of a server that can serve this run: it must {rule}, got {value}"
        )

    # Sampling

    def _check_videos(self, videos: list[Video], name: str) -> None:
        limit, fps = self.info.num_frames, self.info.fps
        for video in videos:
            if 0 <= limit < len(video.frames) or video.fps != fps:
                raise self._unusable(
                    f"""be started with --media-io-kwargs '{{"video": {{"num_frames": -1, "fps": {video.fps:g}}}}}' for the """
                    f"{len(video.frames)} frames of {name}",
                    f"num_frames {limit} and fps {fps:g}",
                )

    def _requests(self) -> ServerRequests:
        return ServerRequests(self.client, ADAPTER if self.adapter and self.version else self.name)

    def _with_current_weights(self, model: PreTrainedModel, sample: Callable[[], list[Trajectory]]) -> list[Trajectory]:
        """If the server has other weights, update them and sample again, once; with several ranks, raise."""
        try:
            return sample()
        except StaleWeights as error:
            # An update is collective, and other ranks may have finished their requests.
            if self.accelerator.num_processes > 1 or self.step is None:
                raise
            logger.warning("%s: updating its weights again", error)
            self.sync_weights(model, self.step, force=True)
            return sample()

    # Weights

    def _load_tensors(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        # A server that was restarted, or that another run connected to, would never answer in the old NCCL group.
        if self.version is not None and self.client.request("/weight_info")["weight_version"] != self.version:
            self.transfer = self.connect()
        self.transfer.send(tensors)

    def _load_folder(self, folder: Path) -> None:
        if self.adapter:
            adapter = {"lora_name": ADAPTER, "lora_path": str(folder), "load_inplace": True}
            self.client.request("/v1/load_lora_adapter", adapter)
        else:
            self.client.request("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})

    def _update(self, load: Callable[[], None], version: str) -> None:
        request = self.client.request
        request("/pause?mode=abort", {})  # requests that timed out here may still run on the server
        try:
            load()
            # The caches hold keys, values and image features of the old weights.
            reset = request("/reset_prefix_cache", {})
            if not isinstance(reset, dict) or not reset.get("success"):
                raise RolloutError(f"{self.client.base_url}/reset_prefix_cache must succeed, got {reset}")
            request("/reset_encoder_cache", {})
            request("/update_weight_version", {"new_version": version})
        finally:
            request("/resume", {})
