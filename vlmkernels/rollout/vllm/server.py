"""vLLM as a server, reached through its HTTP API alone: nothing of this package runs in it, nothing of vLLM here.

Needs a vLLM of 0.32 or newer, started with VLLM_SERVER_DEV_MODE=1 and --enable-scale-out; see docs/rollout.md.
"""

import base64
import io
import json
import logging
import os
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from vlmkernels.ops.checks import require
from vlmkernels.rollout.base import RolloutError, on_main_process
from vlmkernels.rollout.generate import Rollout
from vlmkernels.rollout.vllm.engine import VLLM, Answer, Completion, Prompt, StaleWeights

logger = logging.getLogger(__name__)

CONCURRENCY = 64  # requests under way at a time, from each process
RETRIES, BACKOFF = 2, 0.5  # a request is repeated this often, the n-th time after BACKOFF * 2 ** n seconds
TRANSIENT = (429, 502, 503, 504)  # statuses that another try may not get again
MAX_BYTES = 2**30  # of an answer
ADAPTER = "vlmkernels"  # the name that the server knows the adapters by
FINAL_ONLY = 2  # vllm.sampling_params.RequestOutputKind: all completions in one answer


class VLLMClient:
    """JSON requests to a vLLM server, each bounded in time, repeated after what may pass.

    Args:
        base_url: "http://127.0.0.1:8000".
        timeout: seconds to wait for the server to come up, or to come back.
        request_timeout: seconds, for each request whole.

    The environment's VLLM_API_KEY is sent along; its proxies are not used.
    """

    def __init__(self, base_url: str, timeout: float, request_timeout: float):
        self.base_url, self.timeout, self.request_timeout = base_url.rstrip("/"), timeout, request_timeout
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def wait(self) -> None:
        """Until the server is healthy."""
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                self._send("/health", None, min(10.0, self.request_timeout))
                return
            except (OSError, HTTPException) as error:
                if time.monotonic() >= deadline:
                    rule = f"be that of a healthy vLLM server within vllm_server_timeout = {self.timeout:g} s"
                    raise RolloutError(f"vllm_server_base_url must {rule}, got {self.base_url} ({error})") from error
            time.sleep(min(BACKOFF, max(0.0, deadline - time.monotonic())))

    def request(self, path: str, body: dict | None = None) -> Any:
        """The JSON of the answer (None where it is empty or text) to a POST of ``body``, or to a GET where it is None."""
        for attempt in range(RETRIES + 1):
            try:
                content = self._send(path, body, self.request_timeout)
                return json.loads(content) if content[:1] in (b"{", b"[") else None
            except urllib.error.HTTPError as error:
                message, transient = _message(error), error.code in TRANSIENT
                reason = f"{error.code} {error.reason}: {message}"
            except (OSError, HTTPException, ValueError) as error:
                transient, reason = True, f"{type(error).__name__}: {error}"
            if not transient or attempt == RETRIES:
                tried = f" ({attempt + 1} requests)" if attempt else ""
                raise RolloutError(f"{self.base_url}{path.partition('?')[0]} answered {reason}{tried}")
            logger.warning("%s%s: %s; once more", self.base_url, path, reason)
            time.sleep(BACKOFF * 2**attempt)
            self.wait()

    def _send(self, path: str, body: dict | None, timeout: float) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        deadline, parts, size = time.monotonic() + timeout, [], 0
        request = urllib.request.Request(self.base_url + path, data, headers)
        with self.opener.open(request, timeout=timeout) as response:
            # The socket's time-out is of each read: a server that drips would never meet it.
            while part := response.read1(2**20):
                parts.append(part)
                size += len(part)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no whole answer within {timeout:g} s")
                if size > MAX_BYTES:
                    raise RolloutError(f"{self.base_url}{path} must answer with at most {MAX_BYTES} bytes")
            if response.length:  # read1 takes a connection that broke off for the end
                raise HTTPException(f"the answer broke off {response.length} bytes before its end")
        return b"".join(parts)


def _message(error: urllib.error.HTTPError) -> str:
    with suppress(OSError, HTTPException, ValueError, TypeError, KeyError):
        content = error.read(2000).decode(errors="replace")
        with suppress(ValueError, TypeError, KeyError):
            return str(json.loads(content)["error"]["message"])[:500]
        return content[:500]
    return ""


def png_url(image: Image.Image) -> str:
    """Lossless, and compressed little: the time goes into the network's bytes or into zlib."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _answer(reply: Any) -> Answer:
    """What /inference/v1/generate answered, its form checked."""
    try:
        completions = []
        for choice in sorted(reply["choices"], key=lambda choice: choice["index"]):
            told = choice.get("logprobs")
            if told is not None:
                told = [{int(x["token_id"]): float(x["logprob"]) for x in (at, *at["top_logprobs"])} for at in told["content"]]
            spans = choice.get("weight_versions") or []
            versions = dict.fromkeys(span["version"] for span in spans)
            version = " then ".join(versions) or None
            ids = [int(token) for token in choice["token_ids"]]
            completions.append(Completion(ids, told, choice["finish_reason"] == "stop", version))
        token_ids, prompt_logps = [int(token) for token in reply["prompt_token_ids"]], None
        if (at := reply.get("prompt_logprobs")) is not None:
            pairs = zip(token_ids[1:], at[1:], strict=True)
            prompt_logps = [float(logps[str(token)]["logprob"]) for token, logps in pairs]
        return Answer(token_ids, completions, prompt_logps)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise RolloutError(f"vLLM's answer must be that of /inference/v1/generate, got {reply!r:.300} ({error!r})") from error


class VLLMServer(VLLM):
    """Samples through a vLLM server. Every process sends the requests of its own prompts; the main one pushes weights."""

    def __init__(self, model, processor, args, accelerator: Accelerator):
        super().__init__(model, processor, args, accelerator)
        self.client = VLLMClient(args.vllm_server_base_url, args.vllm_server_timeout, args.vllm_request_timeout)
        self.name, self.logprobs_mode, dtype = on_main_process(accelerator, lambda: self._examine(model))
        self.dtype = getattr(torch, dtype)

    # Before training

    def _examine(self, model) -> tuple[str, str, str]:
        """The served model's name, the log-probabilities it tells and its dtype; raises where the server cannot serve the
        run."""
        self.client.wait()
        paths = self.client.request("/openapi.json")
        self._require(isinstance(paths, dict) and "paths" in paths, "be a vLLM server", "no /openapi.json")
        paths = paths["paths"]
        for path, start in {
            "/collective_rpc": "VLLM_SERVER_DEV_MODE=1 in its environment",
            "/update_weight_version": "VLLM_SERVER_DEV_MODE=1 in its environment, and be of vLLM >= 0.32",
            "/inference/v1/generate": "--enable-scale-out",
            **({"/v1/load_lora_adapter": "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"} if self.adapter else {}),
        }.items():
            self._require(path in paths, f"be started with {start}", f"no {path}")
        info = self.client.request("/server_info?config_format=json")["vllm_config"]
        config, lora = info["model_config"], info["lora_config"]
        mode, modes = config["logprobs_mode"], self.args.vllm_logprobs_modes
        self._require(mode in modes, f"be started with --logprobs-mode {modes[0]}", mode)
        told = len(self.told)
        if mode == "processed_logprobs":
            self._require(told <= config["max_logprobs"], f"be started with --max-logprobs {told}", config["max_logprobs"])
        slots, longest = (
            info["scheduler_config"]["max_num_seqs"],
            self.options.get("max_new_tokens", self.args.max_completion_length),
        )
        number = max(self.args.num_generations, self.args.num_generations_eval)
        self._require(number <= slots, f"be started with --max-num-seqs {number} or more", slots)
        length = config["max_model_len"]
        self._require(longest < length, f"be started with --max-model-len above {longest}, and a prompt", length)
        if self.adapter:
            rank = max([model.peft_config[self.adapter].r, *model.peft_config[self.adapter].rank_pattern.values()])
            self._require(lora is not None, f"be started with --enable-lora --max-lora-rank {rank}", "no LoRA")
            self._require(lora["max_lora_rank"] >= rank, f"be started with --max-lora-rank {rank}", lora["max_lora_rank"])
        name = self.client.request("/v1/models")["data"][0]["id"]
        dtype = str(config["dtype"]).removeprefix("torch.")
        # Weights of another model would break the server that they are pushed to: does it serve this one?
        self.name, self.logprobs_mode, self.dtype, adapter, self.adapter = name, mode, getattr(torch, dtype), self.adapter, None
        launched = self.client.request("/weight_info")["weight_version"] == "default"
        self.client.request("/resume", {})  # a run that was killed amid an update left it paused
        try:
            if launched and info["load_config"]["load_format"] != "dummy" and not self.accelerator.is_fsdp2:
                with model.disable_adapter() if adapter else nullcontext():
                    self._compare(model, f"before training (is {name} the same model?)")
            else:
                self._fingerprint_answer()
        finally:
            self.adapter = adapter
        return name, mode, dtype

    def _require(self, condition: bool, rule: str, value) -> None:
        require(condition, "vllm_server_base_url", f"be of a server that can serve this run: it must {rule}", value)

    # Sampling

    def _answers(self, prompts: list[Prompt], params: dict[str, Any]) -> list[Answer]:
        model = ADAPTER if self.adapter and self.version else self.name

        def one(prompt: Prompt) -> Answer:
            body = {
                "model": model,
                "token_ids": prompt.token_ids,
                "content_parts": [{"type": "image_url", "url": png_url(image)} for image in prompt.images] or None,
                "sampling_params": {**params, "output_kind": FINAL_ONLY},
                "return_token_ids": True,
            }
            return _answer(self.client.request("/inference/v1/generate", body))

        executor = ThreadPoolExecutor(min(CONCURRENCY, len(prompts)))
        try:
            return list(executor.map(one, prompts))
        finally:
            executor.shutdown(wait=False, cancel_futures=True)

    def __call__(self, model, *arguments, **options) -> Rollout:
        try:
            return super().__call__(model, *arguments, **options)
        except StaleWeights as error:
            if self.accelerator.num_processes > 1:
                raise  # the others may be past their requests
            logger.warning("%s: its weights are pushed again", error)
            self.synchronise(model, self.step, again=True)
            return super().__call__(model, *arguments, **options)

    # Weights

    def _load(self, folder: Path, version: str) -> None:
        request = self.client.request
        request("/pause?mode=abort", {})  # requests that timed out here may still run there
        try:
            if self.adapter:
                request("/v1/load_lora_adapter", {"lora_name": ADAPTER, "lora_path": str(folder), "load_inplace": True})
            else:
                request("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
            # Keys, values and image features of the old weights.
            reset = request("/reset_prefix_cache", {})
            if not (isinstance(reset, dict) and reset.get("success")):
                raise RolloutError(f"{self.client.base_url}/reset_prefix_cache must succeed, got {reset}")
            request("/reset_encoder_cache", {})
            request("/update_weight_version", {"new_version": version})
        finally:
            request("/resume", {})
